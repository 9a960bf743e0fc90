// The samples of each class of a problem.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kdkernels::cpu {

// The rows of each class, one class after the other.
struct Classes {
  std::vector<int64_t> rows;
  std::vector<int64_t> starts;  // of each class, and the number of rows
};

inline Classes classes_of(const int64_t* labels, int64_t n) {
  Classes classes;
  classes.rows.resize(n);
  if (n == 0) return classes;
  const auto [low, high] = std::minmax_element(labels, labels + n);
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);
  if (range < static_cast<uint64_t>(4 * n + 1024)) {
    std::vector<int64_t> place(range + 2);
    for (int64_t i = 0; i < n; ++i) ++place[labels[i] - *low + 1];
    for (uint64_t label = 0; label <= range; ++label) {
      if (place[label + 1] > 0) classes.starts.push_back(place[label]);
      place[label + 1] += place[label];
    }
    for (int64_t i = 0; i < n; ++i) classes.rows[place[labels[i] - *low]++] = i;
  } else {
    for (int64_t i = 0; i < n; ++i) classes.rows[i] = i;
    std::stable_sort(classes.rows.begin(), classes.rows.end(),
                     [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || labels[classes.rows[i]] != labels[classes.rows[i - 1]]) {
        classes.starts.push_back(i);
      }
    }
  }
  classes.starts.push_back(n);
  return classes;
}

// A problem, or a class of one.
struct Job {
  int64_t problem;
  const int64_t* rows;  // or null: all
  int64_t count_x;
  int64_t count_y;
};

// All problems, or with labels (problems, x_samples) all their classes, which `classes` keeps.
inline std::vector<Job> jobs_of(int64_t problems, int64_t x_samples, int64_t y_samples,
                                const int64_t* labels, std::vector<Classes>& classes) {
  std::vector<Job> jobs;
  classes.resize(labels == nullptr ? 0 : problems);
  for (int64_t p = 0; p < problems; ++p) {
    if (labels == nullptr) {
      jobs.push_back({p, nullptr, x_samples, y_samples});
      continue;
    }
    classes[p] = classes_of(labels + p * x_samples, x_samples);
    for (size_t c = 0; c + 1 < classes[p].starts.size(); ++c) {
      const int64_t count = classes[p].starts[c + 1] - classes[p].starts[c];
      jobs.push_back({p, classes[p].rows.data() + classes[p].starts[c], count, count});
    }
  }
  return jobs;
}

template <typename S>
double weight_of(const S* weights, int64_t i) {
  return weights == nullptr ? 1.0 : static_cast<double>(weights[i]);
}

struct WeightSums {
  double total = 0, squares = 0;
  // 1 - sum w^2 of weights that are made to add up to 1.
  double left() const { return 1 - squares / (total * total); }
};

// The rows of one side of a job that have weight: a sample of weight 0 is not there.
template <typename S>
WeightSums find_weighted(const S* weights, const Job& job, int64_t count,
                         std::vector<int64_t>& rows) {
  WeightSums sums;
  rows.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = job.rows == nullptr ? i : job.rows[i];
    const double weight = weight_of(weights, row);
    if (weight == 0) continue;
    rows.push_back(row);
    sums.total += weight;
    sums.squares += weight * weight;
  }
  return sums;
}

template <typename T>
void zero_gradients(T* base, const Job& job, int64_t count, int64_t features) {
  for (int64_t i = 0; base != nullptr && i < count; ++i) {
    std::fill_n(base + (job.rows == nullptr ? i : job.rows[i]) * features, features, T{});
  }
}

// Each problem's loss is the sum of its jobs'.
template <typename S>
void write_losses(const std::vector<Job>& jobs, const std::vector<double>& losses, int64_t problems,
                  S* loss) {
  std::vector<double> totals(problems);
  for (size_t i = 0; i < jobs.size(); ++i) totals[jobs[i].problem] += losses[i];
  for (int64_t p = 0; p < problems; ++p) loss[p] = static_cast<S>(totals[p]);
}

}  // namespace kdkernels::cpu
