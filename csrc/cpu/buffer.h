#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kdkernels::cpu {

// Memory that starts where a register's load does not cross lines of the cache.
template <typename S>
class Buffer {
 public:
  S* reserve(int64_t n) {
    if (n > size_) {
      memory_.reset(static_cast<S*>(::operator new(static_cast<size_t>(n) * sizeof(S), kAlign)));
      size_ = n;
    }
    return memory_.get();
  }
  S* data() { return memory_.get(); }
  const S* data() const { return memory_.get(); }
  S& operator[](int64_t i) { return memory_.get()[i]; }
  const S& operator[](int64_t i) const { return memory_.get()[i]; }

  // For a buffer that outlives a call: what a thread keeps need not be brought in page by page by
  // the next call. More than kKept goes back.
  void end_of_call() {
    if (size_ * static_cast<int64_t>(sizeof(S)) <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(S* memory) const { ::operator delete(memory, kAlign); }
  };
  std::unique_ptr<S, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace kdkernels::cpu
