// One-dimensional transport on the CPU: both rows are sorted, equal ranks (or merged quantiles)
// meet.
//
// Sorting is nearly all of it. A row's values become integers of the same order, each packed with
// its place; three passes of a radix sort (six for float64) take 2048 of them through the first
// caches, and a comparison sort takes short rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../kdkernels.h"
#include "parallel.h"

namespace kdkernels::cpu {
namespace {

// Rows below the first are sorted by comparisons; those below the second by digits of 8 bits, whose
// counts are soon cleared and added up; longer ones by digits of 11, in fewer passes.
constexpr int64_t kRadixFrom = 64;
constexpr int64_t kLongFrom = 1024;
constexpr size_t kCounts = 8 * 2048;  // for any of them
// About 10 ns a value, so that this many are worth waking a thread.
constexpr int64_t kValuesPerThread = 2048;

// A value and its place; `key` orders as the values do.
template <typename S>
struct Item;
template <>
struct Item<float> {
  using Bits = uint32_t;
  uint64_t packed;
  Item() = default;
  Item(uint32_t key, uint32_t place) : packed(static_cast<uint64_t>(key) << 32 | place) {}
  uint32_t key() const { return static_cast<uint32_t>(packed >> 32); }
  uint32_t place() const { return static_cast<uint32_t>(packed); }
  bool operator<(const Item& other) const { return packed < other.packed; }
};
template <>
struct Item<double> {
  using Bits = uint64_t;
  uint64_t bits;
  uint32_t where;
  Item() = default;
  Item(uint64_t key, uint32_t place) : bits(key), where(place) {}
  uint64_t key() const { return bits; }
  uint32_t place() const { return where; }
  bool operator<(const Item& other) const {
    return bits != other.bits ? bits < other.bits : where < other.where;
  }
};

template <typename S>
typename Item<S>::Bits key_of(S value) {
  using Bits = typename Item<S>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  value += S(0);  // -0 is 0: equal values stay in the order of their places
  Bits bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename S>
S value_of(typename Item<S>::Bits key) {
  using Bits = typename Item<S>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits bits = key & kSign ? key & ~kSign : ~key;
  S value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <int kDigitBits, typename S>
Item<S>* radix_sort(Item<S>* items, Item<S>* spare, int64_t n, uint32_t* counts) {
  constexpr int kDigits = 1 << kDigitBits;
  constexpr int kPasses = (8 * sizeof(typename Item<S>::Bits) + kDigitBits - 1) / kDigitBits;
  std::fill_n(counts, kPasses * kDigits, 0u);
  for (int64_t i = 0; i < n; ++i) {
    const auto key = items[i].key();
    for (int pass = 0; pass < kPasses; ++pass) {
      ++counts[pass * kDigits + (key >> (pass * kDigitBits) & (kDigits - 1))];
    }
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* count = counts + pass * kDigits;
    const int shift = pass * kDigitBits;
    if (count[items[0].key() >> shift & (kDigits - 1)] == n) continue;  // all have this digit
    uint32_t start = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      const uint32_t here = count[digit];
      count[digit] = start;
      start += here;
    }
    for (int64_t i = 0; i < n; ++i) {
      spare[count[items[i].key() >> shift & (kDigits - 1)]++] = items[i];
    }
    std::swap(items, spare);
  }
  return items;
}

// Sorts items[0..n), with spare[0..n) to work in; returns which of the two holds the result.
template <typename S>
Item<S>* sort_items(Item<S>* items, Item<S>* spare, int64_t n, uint32_t* counts) {
  if (n < kRadixFrom) {
    std::sort(items, items + n);
    return items;
  }
  return n < kLongFrom ? radix_sort<8, S>(items, spare, n, counts)
                       : radix_sort<11, S>(items, spare, n, counts);
}

// What a row is sorted in.
template <typename S>
struct Room {
  explicit Room(int64_t n) : items(n), spare(n) {}
  std::vector<Item<S>> items;
  std::vector<Item<S>> spare;
};

// The row's values that have weight, sorted: their number goes to `kept`.
template <typename S>
const Item<S>* sorted(const S* row, const S* weights, int64_t n, Room<S>& room, uint32_t* counts,
                      int64_t* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights != nullptr && weights[i] == S(0)) continue;
    room.items[count++] = Item<S>(key_of(row[i]), static_cast<uint32_t>(i));
  }
  *kept = count;
  return sort_items(room.items.data(), room.spare.data(), count, counts);
}

// |d|^p and its derivative, 0 at d = 0.
template <typename S>
S power(S d, double p, S* derivative) {
  if (p == 2) {
    *derivative = 2 * d;
    return d * d;
  }
  const S size = std::abs(d), sign = d > 0 ? S(1) : d < 0 ? S(-1) : d;
  if (p == 1) {
    *derivative = sign;
    return size;
  }
  const S lower = std::pow(size, static_cast<S>(p - 1));
  *derivative = static_cast<S>(p) * lower * sign;
  return lower * size;
}

template <typename S>
void equal_ranks(const Item<S>* a, const Item<S>* b, int64_t n, double p, S* loss, S* grad_x,
                 S* grad_y) {
  double sum = 0;
  const S share = S(1) / static_cast<S>(n);
  for (int64_t i = 0; i < n; ++i) {
    S slope;
    sum += power(value_of<S>(a[i].key()) - value_of<S>(b[i].key()), p, &slope);
    if (grad_x != nullptr) grad_x[a[i].place()] = share * slope;
    if (grad_y != nullptr) grad_y[b[i].place()] = -share * slope;
  }
  *loss = static_cast<S>(sum / static_cast<double>(n));
}

// How much of the mass lies up to the i-th sorted sample; the last one's is exactly 1.
template <typename S>
struct Levels {
  const Item<S>* items;
  const S* weights;  // or null: equal
  int64_t n;
  double total;
  double sum = 0;
  double next(int64_t i) {
    if (i >= n) return 2;
    if (weights != nullptr) sum += static_cast<double>(weights[items[i].place()]);
    if (i == n - 1) return 1;
    return weights != nullptr ? std::min(sum / total, 1.0)
                              : static_cast<double>(i + 1) / static_cast<double>(n);
  }
};

template <typename S>
void merged_quantiles(Levels<S> a, Levels<S> b, double p, S* loss, S* grad_x, S* grad_y) {
  double sum = 0, low = 0, level_a = a.next(0), level_b = b.next(0);
  int64_t i = 0, j = 0;
  while (i < a.n && j < b.n) {
    const double level = std::min(level_a, level_b), mass = level - low;
    S slope;
    const S cost = power(value_of<S>(a.items[i].key()) - value_of<S>(b.items[j].key()), p, &slope);
    if (mass > 0) {
      sum += mass * static_cast<double>(cost);
      if (grad_x != nullptr) grad_x[a.items[i].place()] += static_cast<S>(mass) * slope;
      if (grad_y != nullptr) grad_y[b.items[j].place()] -= static_cast<S>(mass) * slope;
    }
    low = level;
    const bool step_a = level_a <= level, step_b = level_b <= level;
    if (step_a) level_a = a.next(++i);
    if (step_b) level_b = b.next(++j);
  }
  *loss = static_cast<S>(sum);
}

template <typename S>
void run_rows(const SlicedWassersteinParams& params, int64_t begin_row, int64_t end_row) {
  const int64_t n = params.n, m = params.m;
  Room<S> room_x(n), room_y(m);
  std::vector<uint32_t> counts(kCounts);
  for (int64_t r = begin_row; r < end_row; ++r) {
    const int64_t problem = r / params.projections;
    const auto at = [](const void* base, int64_t offset) {
      return base == nullptr ? nullptr : static_cast<const S*>(base) + offset;
    };
    const S* x_weights = at(params.x_weights, problem * n);
    const S* y_weights = at(params.y_weights, problem * m);
    S* loss = static_cast<S*>(params.loss) + r;
    S* grad_x = const_cast<S*>(at(params.grad_x, r * n));
    S* grad_y = const_cast<S*>(at(params.grad_y, r * m));
    int64_t kept_x, kept_y;
    const Item<S>* a = sorted(at(params.x, r * n), x_weights, n, room_x, counts.data(), &kept_x);
    const Item<S>* b = sorted(at(params.y, r * m), y_weights, m, room_y, counts.data(), &kept_y);
    if (x_weights == nullptr && y_weights == nullptr && n == m && n > 0) {
      equal_ranks(a, b, n, params.p, loss, grad_x, grad_y);
      continue;
    }
    if (grad_x != nullptr) std::fill_n(grad_x, n, S(0));
    if (grad_y != nullptr) std::fill_n(grad_y, m, S(0));
    *loss = 0;
    if (kept_x == 0 || kept_y == 0) continue;
    const auto total = [](const S* weights, int64_t size) {
      double sum = 0;
      for (int64_t i = 0; weights != nullptr && i < size; ++i) sum += weights[i];
      return sum;
    };
    merged_quantiles<S>({a, x_weights, kept_x, total(x_weights, n)},
                        {b, y_weights, kept_y, total(y_weights, m)}, params.p, loss, grad_x,
                        grad_y);
  }
}

}  // namespace

void sliced_wasserstein(const SlicedWassersteinParams& params, int threads) {
  auto* body = params.dtype == DType::kFloat64 ? run_rows<double> : run_rows<float>;
  for_each_run_of_rows(
      params.rows, params.n + params.m, threads,
      [&](int64_t begin, int64_t end) { body(params, begin, end); }, kValuesPerThread);
}

}  // namespace kdkernels::cpu
