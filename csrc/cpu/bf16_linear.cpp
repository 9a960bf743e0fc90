// out = x w^T + bias of bfloat16 matrices in float32, on CPUs whose AVX-512 multiplies bfloat16
// pairs. Neither products nor sums are rounded to bfloat16; denormal inputs count as 0.
//
// A thread takes panels of kColumns rows of w. A panel is packed, kPairs pairs of features at a
// time, with the kColumns values of a pair side by side; kRows rows of x meet it in registers, 24
// sums of 16 columns each, with one broadcast pair of x for four multiplications. A packed panel is
// 32 KiB: it stays in L1 for all rows of x. Where the CPU has AMX, 16 rows and 32 features at a
// time meet the same panel in its tiles; what is left over goes the way above.
#include "../kdkernels.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KDK_BF16_DOT 1
// GCC 12's own headers of AVX-512 make it warn.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>
#include <vector>
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define KDK_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#endif

namespace kdkernels::cpu {

#ifdef KDK_BF16_DOT
#define KDK_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

constexpr int64_t kColumns = 64;
constexpr int64_t kRows = 6;
constexpr int64_t kPairs = 128;

KDK_TARGET inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

// Rows of 16 dwords -> columns: t[i][j] becomes t[j][i].
KDK_TARGET inline void transpose16(__m512i t[16]) {
  __m512i u[16];
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    u[i + 4] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    u[i + 8] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    u[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(u[i], u[i + 8], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(u[i], u[i + 8], 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(u[i + 4], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(u[i + 4], u[i + 12], 0xdd);
  }
}

// panel[p][c] = the pair (w[c][2 p], w[c][2 p + 1]), 0 beyond `columns` and beyond `features`.
KDK_TARGET void pack(const uint16_t* w, int64_t stride, int64_t columns, int64_t features,
                     uint32_t* panel) {
  for (int64_t group = 0; group < kColumns; group += 16) {
    for (int64_t k = 0; k < features; k += 32) {
      const int64_t left = features - k;
      const __mmask32 lanes =
          left >= 32 ? __mmask32(0xffffffffu) : __mmask32((uint32_t(1) << left) - 1);
      __m512i t[16];
      for (int64_t c = 0; c < 16; ++c) {
        t[c] = group + c < columns ? _mm512_maskz_loadu_epi16(lanes, w + (group + c) * stride + k)
                                   : _mm512_setzero_si512();
      }
      transpose16(t);
      const int64_t pairs = std::min<int64_t>(16, (left + 1) / 2);
      for (int64_t p = 0; p < pairs; ++p) {
        _mm512_store_si512(panel + (k / 2 + p) * kColumns + group, t[p]);
      }
    }
  }
}

KDK_TARGET inline __m512 widen_bias(const uint16_t* bias, __mmask16 lanes) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, bias);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// out[R rows][kColumns] (+)= x[R rows] times the panel.
template <int R>
KDK_TARGET void multiply(const uint16_t* x, int64_t x_stride, const uint32_t* panel, int64_t pairs,
                         const uint16_t* bias, bool first, float* out, int64_t out_stride,
                         int64_t columns) {
  __m512 sums[R][4];
  const __mmask16 lanes[4] = {first_lanes(columns), first_lanes(columns - 16),
                              first_lanes(columns - 32), first_lanes(columns - 48)};
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512 start =
        first && bias != nullptr ? widen_bias(bias + 16 * v, lanes[v]) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      sums[r][v] = first ? start : _mm512_maskz_loadu_ps(lanes[v], out + r * out_stride + 16 * v);
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(panel + p * kColumns);
    const __m512bh b1 = (__m512bh)_mm512_load_si512(panel + p * kColumns + 16);
    const __m512bh b2 = (__m512bh)_mm512_load_si512(panel + p * kColumns + 32);
    const __m512bh b3 = (__m512bh)_mm512_load_si512(panel + p * kColumns + 48);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride + 2 * p, 4);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, b0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], a, b1);
      sums[r][2] = _mm512_dpbf16_ps(sums[r][2], a, b2);
      sums[r][3] = _mm512_dpbf16_ps(sums[r][3], a, b3);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      _mm512_mask_storeu_ps(out + r * out_stride + 16 * v, lanes[v], sums[r][v]);
    }
  }
}

KDK_TARGET void multiply_rows(int64_t rows, const uint16_t* x, int64_t x_stride,
                              const uint32_t* panel, int64_t pairs, const uint16_t* bias,
                              bool first, float* out, int64_t out_stride, int64_t columns) {
  switch (rows) {
    case 6:
      return multiply<6>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
    case 5:
      return multiply<5>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
    case 4:
      return multiply<4>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
    case 3:
      return multiply<3>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
    case 2:
      return multiply<2>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
    default:
      return multiply<1>(x, x_stride, panel, pairs, bias, first, out, out_stride, columns);
  }
}

constexpr int64_t kTile = 16;  // rows, pairs and columns of a tile

#ifdef KDK_AMX
#define KDK_TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")))

constexpr int64_t kTilesOfPanel = kColumns / kTile;
static_assert(kTilesOfPanel == 4, "the tiles below are named one by one");

// The CPU has the tiles, and the system lets this process use them.
bool has_tiles() {
  static const bool has = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
}

// GCC's intrinsics do not say that they read and write memory: hence the statements that do.

// What the tiles of a thread look like, until its next release.
KDK_TILES void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 7; ++i) config.bytes_of_row[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

KDK_TILES void release_tiles() { _tile_release(); }

// out[kTile rows][kColumns] (+)= x[kTile rows] times the panel; `pairs` in whole tiles.
KDK_TILES void multiply_tiles(const uint16_t* x, int64_t x_stride, const uint32_t* panel,
                              int64_t pairs, const uint16_t* bias, bool first, float* out,
                              int64_t out_stride, int64_t columns) {
  // Tiles are loaded and stored whole: what has fewer columns, or starts from a bias, takes a
  // detour.
  alignas(64) float buffer[kTile * kColumns];
  float* sums = out;
  int64_t stride = out_stride;
  if (columns < kColumns || (first && bias != nullptr)) {
    sums = buffer, stride = kColumns;
    for (int64_t v = 0; v < kTilesOfPanel; ++v) {
      const __mmask16 lanes = first_lanes(columns - kTile * v);
      const __m512 start =
          bias == nullptr ? _mm512_setzero_ps() : widen_bias(bias + kTile * v, lanes);
      for (int64_t r = 0; r < kTile; ++r) {
        const float* from = out + r * out_stride + kTile * v;
        _mm512_store_ps(buffer + r * kColumns + kTile * v,
                        first ? start : _mm512_maskz_loadu_ps(lanes, from));
      }
    }
  }
  __asm__ volatile("" ::: "memory");
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (first && sums == out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kTile, bytes);
    _tile_loadd(2, sums + 2 * kTile, bytes);
    _tile_loadd(3, sums + 3 * kTile, bytes);
  }
  constexpr int64_t kBytesOfPair = kColumns * static_cast<int64_t>(sizeof(uint32_t));
  for (int64_t p = 0; p < pairs; p += kTile) {
    const uint32_t* from = panel + p * kColumns;
    _tile_loadd(4, x + 2 * p, x_stride * static_cast<int64_t>(sizeof(uint16_t)));
    _tile_loadd(5, from, kBytesOfPair);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, from + kTile, kBytesOfPair);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, from + 2 * kTile, kBytesOfPair);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, from + 3 * kTile, kBytesOfPair);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kTile, bytes);
  _tile_stored(2, sums + 2 * kTile, bytes);
  _tile_stored(3, sums + 3 * kTile, bytes);
  __asm__ volatile("" ::: "memory");
  if (sums == out) return;
  for (int64_t v = 0; v < kTilesOfPanel; ++v) {
    const __mmask16 lanes = first_lanes(columns - kTile * v);
    for (int64_t r = 0; r < kTile; ++r) {
      _mm512_mask_storeu_ps(out + r * out_stride + kTile * v, lanes,
                            _mm512_load_ps(buffer + r * kColumns + kTile * v));
    }
  }
}
#else
bool has_tiles() { return false; }
void configure_tiles() {}
void release_tiles() {}
void multiply_tiles(const uint16_t*, int64_t, const uint32_t*, int64_t, const uint16_t*, bool,
                    float*, int64_t, int64_t) {}
#endif

}  // namespace

bool has_bf16_linear() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void bf16_linear(const Bf16LinearParams& params, int threads) {
  const auto* x = static_cast<const uint16_t*>(params.x);
  const auto* w = static_cast<const uint16_t*>(params.weight);
  const auto* bias = static_cast<const uint16_t*>(params.bias);
  int64_t x_stride = params.x_stride;
  // The last feature of an odd number has no partner in x: there a copy has a 0.
  std::vector<uint16_t> padded;
  if (params.features % 2) {
    x_stride = params.features + 1;
    padded.assign(static_cast<size_t>(params.rows * x_stride), 0);
    for (int64_t r = 0; r < params.rows; ++r) {
      std::memcpy(padded.data() + r * x_stride, x + r * params.x_stride,
                  static_cast<size_t>(params.features) * sizeof(uint16_t));
    }
    x = padded.data();
  }
  const int64_t panels = (params.classes + kColumns - 1) / kColumns;
  const bool tiles = has_tiles() && params.rows >= kTile;
  const auto run = [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t panel[kPairs * kColumns];
    if (tiles) configure_tiles();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * kColumns;
      const int64_t columns = std::min(kColumns, params.classes - column);
      for (int64_t k = 0; k < params.features; k += 2 * kPairs) {
        const int64_t features = std::min(2 * kPairs, params.features - k);
        pack(w + column * params.weight_stride + k, params.weight_stride, columns, features, panel);
        const uint16_t* start = bias == nullptr ? nullptr : bias + column;
        float* out = static_cast<float*>(params.out) + column;
        const int64_t pairs = (features + 1) / 2;
        // Tiles take so many rows and pairs.
        const int64_t whole = tiles ? features / (2 * kTile) * kTile : 0;
        const int64_t tiled = whole > 0 ? params.rows / kTile * kTile : 0;
        for (int64_t r = 0; r < tiled; r += kTile) {
          multiply_tiles(x + r * x_stride + k, x_stride, panel, whole, start, k == 0,
                         out + r * params.out_stride, params.out_stride, columns);
        }
        const auto rest = [&](int64_t from, int64_t to, int64_t done) {
          for (int64_t r = from; r < to && done < pairs; r += kRows) {
            multiply_rows(std::min(kRows, to - r), x + r * x_stride + k + 2 * done, x_stride,
                          panel + done * kColumns, pairs - done, start, k == 0 && done == 0,
                          out + r * params.out_stride, params.out_stride, columns);
          }
        };
        rest(0, tiled, whole);
        rest(tiled, params.rows, 0);
      }
    }
    if (tiles) release_tiles();
  };
  // 32 multiplications a cycle: so many are about 20 us.
  const int64_t work = std::max<int64_t>(1, params.rows * params.features * kColumns / 128);
  for_each_run_of_rows(panels, work, threads, run);
}

#else

bool has_bf16_linear() { return false; }
void bf16_linear(const Bf16LinearParams&, int) {}

#endif

}  // namespace kdkernels::cpu
