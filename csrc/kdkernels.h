// Every native kernel on one page: what it computes, its parameters, its declaration.
//
// No kernel knows Torch: the caller checks, allocates and passes addresses, sizes and strides in
// elements. "Statistics" are float32, or float64 when dtype is kFloat64.
#pragma once

#include <cstdint>

namespace kdkernels {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Row-wise KL divergence of tempered softmaxes, P from `target` and Q from `input`:
//
//   P = softmax(target / T_P), Q = softmax(input / T_Q), D = log P - log Q
//   loss           = scale sum_j P_j D_j
//   grad_input_j   = scale (Q_j - P_j) / T_Q
//   grad_target_j  = scale P_j (D_j - KL) / T_P  with KL = sum_j P_j D_j
//   grad_input_temperature  = -scale / T_Q  sum_j (Q_j - P_j) input_j / T_Q
//   grad_target_temperature = -scale / T_P  sum_j P_j (D_j - KL) target_j / T_P
//
// A null output is not computed. A row whose mask is 0 is not read: its outputs are 0.
struct KlDivParams {
  const void* input;               // (rows, classes), row stride input_stride, class stride 1
  const void* target;              // (rows, classes), row stride target_stride, class stride 1
  const void* input_temperature;   // (rows,) statistics, or null: input_temperature_value
  const void* target_temperature;  // (rows,) statistics, or null: target_temperature_value
  const void* row_scale;           // (rows,) statistics, or null: scale
  const uint8_t* mask;             // (rows,), or null: every row counts
  void* loss;                      // (rows,) statistics, or null
  void* grad_input;                // (rows, classes) contiguous, or null
  void* grad_target;               // (rows, classes) contiguous, or null
  void* grad_input_temperature;    // (rows,) statistics, or null
  void* grad_target_temperature;   // (rows,) statistics, or null
  double input_temperature_value;
  double target_temperature_value;
  double scale;
  int64_t rows;
  int64_t classes;
  int64_t input_stride;
  int64_t target_stride;
  DType dtype;
};

// What a logit_loss puts between P (from `target`) and Q (from `input`), seen from the input, whose
// gradient it makes: the target's gradient is a second call with the sides exchanged. y is the
// row's label, P' and Q' the softmaxes over the classes other than y (nothing, where there is no
// other), b_P = (P_y, 1 - P_y); p and q are P and Q at temperature 1.
enum class Divergence : int32_t {
  kNone = 0,               // nothing: without logit_mse the target is not read, and may be null
  kKl = 1,                 // KL(P||Q)
  kReverseKl = 2,          // KL(Q||P)
  kMixture = 3,            // first KL(P||M) + second KL(Q||M), M = mix P + (1 - mix) Q, 0 < mix < 1
  kTotalVariation = 4,     // 1/2 sum_j |P_j - Q_j|
  kDecoupled = 5,          // first KL(b_P||b_Q) + second KL(P'||Q')
  kReverseDecoupled = 6,   // first KL(b_Q||b_P) + second KL(Q'||P')
  kNormalized = 7,         // first (-p_y log q_y) + second (-sum_j P'_j log Q'_j)
  kReverseNormalized = 8,  // first (-q_y log p_y) + second (-sum_j Q'_j log P'_j)
  kStatistics = 9,         // KL(P||Q), without a gradient; `terms` are the statistics named below
};

// Rows of a loss from logits: a soft term against the target, hard cross-entropy, z-loss, and the
// mean squared difference of the logits.
//
//   P = softmax(target / T_P), Q = softmax(input / T_Q)
//   soft  = soft_scale D(P, Q); of the normalized divergences soft_scale takes the second part only
//   hard  = hard_weight (lse - (1 - label_smoothing) input_y - label_smoothing mean_j input_j)
//   z     = z_loss lse^2, with lse = log sum_j e^input_j
//   mse   = logit_mse / classes sum_j (input_j - target_j)^2, where -inf - -inf = 0
//   loss  = row_scale (soft + hard + z + mse)
//   terms = row_scale soft, row_scale hard, row_scale z, the part of the first that has the factor
//           `first`, of the decoupled and normalized divergences (else 0), and row_scale mse
//   grad_input             = dloss / dinput
//   grad_input_temperature = dloss / dT_Q, with soft_scale constant
//
// kStatistics: terms = row_scale times the entropy of P, that of Q, sum_j min(P_j, Q_j), and 1
// where the first maxima of target and input are the same class, else 0; logit_mse must be 0.
//
// With `standardize`, the soft term (only) takes z' = (z - mean) / (1e-7 + std) instead of z, on
// both sides, with std over classes - 1; a row without spread gives z' = 0 and no gradient. Logits
// of -inf stay so, and are not counted in the means, std and its `classes`. A label outside [0,
// classes) makes its row's outputs NaN (on the CPU: std::invalid_argument). A null output is not
// computed. A row whose mask is 0 is not read: its outputs are 0. `labels` may be null where
// neither hard_weight nor the divergence needs them, `target` where neither logit_mse nor the
// divergence does. An infinite difference of two logits makes the mse infinite, and its gradient at
// that class, with the difference's sign.
//
// grad_input has dtype, or of kFloat32 logits kFloat16 or kBFloat16, rounded once. It may be the
// same memory as `input` where dtype and stride are the same, too.
constexpr int kTerms = 5;

struct LogitLossParams {
  const void* input;               // (rows, classes), row stride input_stride, class stride 1
  const void* target;              // (rows, classes), row stride target_stride, class stride 1
  const int64_t* labels;           // (rows,), or null
  const void* input_temperature;   // (rows,) statistics, or null: input_temperature_value
  const void* target_temperature;  // (rows,) statistics, or null: target_temperature_value
  const void* soft_scale;          // (rows,) statistics, or null: soft_scale_value
  const void* row_scale;           // (rows,) statistics, or null: scale
  const uint8_t* mask;             // (rows,), or null: every row counts
  void* loss;                      // (rows,) statistics, or null
  void* terms;                     // (kTerms, rows) statistics, or null
  void* grad_input;                // (rows, classes) grad_dtype, row stride grad_stride, or null
  void* grad_input_temperature;    // (rows,) statistics, or null
  double input_temperature_value;
  double target_temperature_value;
  double soft_scale_value;
  double scale;
  double first;
  double second;
  double mix;
  double hard_weight;
  double label_smoothing;
  double z_loss;
  double logit_mse;
  int64_t rows;
  int64_t classes;
  int64_t input_stride;
  int64_t target_stride;
  int64_t grad_stride;
  Divergence divergence;
  bool standardize;
  DType dtype;
  DType grad_dtype;
};

// What a teacher's top k leave over: the mass that their log-probabilities do not name.
enum class Tail : int32_t {
  kBucket = 0,       // one more class on both sides, with the mass that the k leave
  kRenormalize = 1,  // P and Q are made to sum to 1 over the k
  kDrop = 2,         // no term for it
};

// Rows of KL(P||Q) of a teacher known by k log-probabilities, P_i = e^log_probs_i at class
// indices_i, and Q = softmax(input / T_Q). With I the set of a row's indices:
//
//   kBucket       sum_i P_i log(P_i / Q_i) + P_r log(P_r / Q_r), P_r = max(0, 1 - sum_i P_i), Q_r =
//                 sum of Q outside I (no last term where k = classes)
//   kRenormalize  sum_i P'_i log(P'_i / Q'_i), P' = P / sum_i P_i, Q' = Q / sum_i Q_i
//   kDrop         sum_i P_i log(P_i / Q_i)
//
// loss and the gradients are times row_scale. An index outside [0, classes), or twice in a row,
// makes that row's outputs NaN (on the CPU: std::invalid_argument); CUDA and Triton look for the
// first kind only. A null output is not computed. A row whose mask is 0 is not read: its outputs
// are 0. P_i = 0 counts for nothing on P's side.
struct TopkKlDivParams {
  const void* input;              // (rows, classes), row stride input_stride, class stride 1
  const void* log_probs;          // (rows, k) statistics, contiguous
  const int64_t* indices;         // (rows, k) contiguous
  const void* input_temperature;  // (rows,) statistics, or null: input_temperature_value
  const void* row_scale;          // (rows,) statistics, or null: scale
  const uint8_t* mask;            // (rows,), or null: every row counts
  void* loss;                     // (rows,) statistics, or null
  void* grad_input;               // (rows, classes), row stride grad_stride, or null
  void* grad_log_probs;           // (rows, k) statistics, contiguous, or null
  void* grad_input_temperature;   // (rows,) statistics, or null
  double input_temperature_value;
  double scale;
  int64_t rows;
  int64_t classes;
  int64_t k;
  int64_t input_stride;
  int64_t grad_stride;
  Tail tail;
  DType dtype;
};

constexpr int kMaxTeachers = 16;

// Rows of sum_k weight_k KL(P_k||Q_k), with P_k = softmax(targets_k / T_k), Q_k = softmax(input /
// T_k), and the gradient of that with respect to the input; `losses` are the KLs themselves. Where
// teacher_mask is 0 the teacher's row is not read, and counts for nothing (its `losses` are 0). A
// null output is not computed. A row whose mask is 0 is not read: its outputs are 0.
struct MultiTeacherKlDivParams {
  const void* input;                  // (rows, classes), row stride input_stride, class stride 1
  const void* targets[kMaxTeachers];  // (rows, classes) each, class stride 1
  int64_t target_strides[kMaxTeachers];
  const void* temperature;      // (teachers, rows) statistics, or null: temperature_values
  const void* weight;           // (teachers, rows) statistics, or null: weight_values
  const uint8_t* teacher_mask;  // (teachers, rows), or null: every teacher counts
  const uint8_t* mask;          // (rows,), or null: every row counts
  void* loss;                   // (rows,) statistics, or null
  void* losses;                 // (teachers, rows) statistics, contiguous, or null
  void* grad_input;             // (rows, classes) contiguous, or null
  double temperature_values[kMaxTeachers];
  double weight_values[kMaxTeachers];
  int64_t temperature_strides[2];  // of teachers, of rows; 0 is legal, here and below
  int64_t weight_strides[2];
  int64_t teacher_mask_strides[2];
  int64_t rows;
  int64_t classes;
  int64_t teachers;
  int64_t input_stride;
  DType dtype;
};

// Pooling of two maps of P positions, s (student) and t (teacher), and their squared distance. For
// each sample and channel:
//
//   pooled_student = 1/P sum_p s_p, pooled_teacher = 1/P sum_p t_p
//   mse            = 1/(channels P) sum_cp (s_cp - t_cp)^2
//   grad_student   =   2 grad_mse / (channels P) (s_p - t_p) + grad_pooled_student / P
//   grad_teacher   = - 2 grad_mse / (channels P) (s_p - t_p) + grad_pooled_teacher / P
//
// A null output is not computed (the first three go together), a null upstream gradient is 0, and
// without grad_mse the maps are not read. A sample whose mask is 0 is not read: its outputs are 0.
// The mse of a sample is the sum of its `pieces` values; the CPU takes one piece only.
struct PoolMseParams {
  const void* student;  // (batch, channels, positions), or (batch, positions, channels); contiguous
  const void* teacher;  // the same
  const uint8_t* mask;  // (batch,), or null: every sample counts
  const void* grad_pooled_student;  // (batch, channels), or null
  const void* grad_pooled_teacher;  // (batch, channels), or null
  const void* grad_mse;             // (batch,) statistics, or null
  void* pooled_student;             // (batch, channels), or null
  void* pooled_teacher;             // (batch, channels), or null
  void* mse;                        // (batch, pieces) statistics, or null
  void* grad_student;               // as student, or null
  void* grad_teacher;               // as teacher, or null
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t pieces;
  bool channels_last;  // (batch, positions, channels)
  DType dtype;
};

// Two batches of features, problem by problem, and what a distance of them fills. Of weights that
// are null all are 1. A null output is not computed.
struct PairParams {
  const void* x;          // (problems, x_samples, features), strides x_problem_stride, x_stride, 1
  const void* y;          // (problems, y_samples, features), strides y_problem_stride, y_stride, 1
  const int64_t* labels;  // (problems, x_samples) contiguous, or null
  const void* x_weights;  // (problems, x_samples) statistics, contiguous, or null
  const void* y_weights;  // (problems, y_samples) statistics, contiguous, or null
  void* loss;             // (problems,) statistics
  void* grad_x;           // (problems, x_samples, features) contiguous, or null
  void* grad_y;           // (problems, y_samples, features) contiguous, or null
  int64_t problems;
  int64_t x_samples;
  int64_t y_samples;
  int64_t features;
  int64_t x_problem_stride;
  int64_t x_stride;
  int64_t y_problem_stride;
  int64_t y_stride;
  DType dtype;
};

// CORAL takes no more than that: squared Frobenius distances of covariances, over 4 features^2,
// with samples' weights w that are made to add up to 1 and C = sum w (x - mean)(x - mean)^T / (1 -
// sum w^2):
//
//   loss = |C_x - C_y|^2 / (4 features^2)
//
// With labels (x and y have the same samples then), the sum over each problem's classes. A problem
// or class with fewer than two samples of positive weight on a side is 0. Where x and y are equal,
// loss and gradients are exactly 0.

enum class GaussianDistance : int32_t { kWasserstein = 0, kKl = 1 };

// Distances of the diagonal Gaussians of two batches of features. With means and variances (ddof 0)
// of the samples, each of its weight, s^2 = v:
//
//   kWasserstein  sum_j (mean_x - mean_y)^2 + (s_x - s_y)^2
//   kKl           1/2 sum_j (v_x / v_y - 1 - log(v_x / v_y) + (mean_x - mean_y)^2 / v_y), eps added
//   to
//                 both variances
//
// With labels (x and y have the same samples then), the sum over each problem's classes; of a KL,
// those with min_samples samples of positive weight on both sides. What has no weight on a side is
// 0.
struct GaussianParams : PairParams {
  double eps;
  int64_t min_samples;
  GaussianDistance distance;
};

// The kernels of a maximum mean discrepancy, each summed over the bandwidths s; r = |a - b|.
enum class MmdKernel : int32_t {
  kRbf = 0,         // e^(-r^2 / (2 s^2))
  kLaplacian = 1,   // e^(-r / s)
  kPolynomial = 2,  // (ab / s^2 + 1)^3
  kImq = 3,         // (1 + r^2 / s^2)^(-1/2)
  kEnergy = 4,      // -r, without a bandwidth
};

// Maximum mean discrepancies of two batches of features, with samples' weights u and v that are
// made to add up to 1:
//
//   loss = sum_ij u_i u_j k(x_i, x_j) + sum_ij v_i v_j k(y_i, y_j) - 2 sum_ij u_i v_j k(x_i, y_j)
//
// `unbiased` leaves i = j out of the first two, and divides them by 1 - sum_i u_i^2 (v_i^2).
// Without bandwidths there is one, the mean of the three sums with r for k (all pairs; 1 where that
// is 0), which is taken for a constant; of the polynomial, sqrt(features). With labels (x and y
// have the same samples then), the sum over each problem's classes, each with a bandwidth of its
// own. A problem or class without a sample of positive weight on each side (`unbiased`: two) is 0.
// Where x and y are equal, and not `unbiased`, loss and gradients are exactly 0. The gradient of r
// at r = 0 is 0.
struct MmdParams : PairParams {
  const void* bandwidths;  // (bandwidth_count,) statistics, contiguous, or null
  int64_t bandwidth_count;
  MmdKernel kernel;
  bool unbiased;
};

// Squared differences of feature maps under a weight map:
//
//   loss = sum_n,hw weight_map_n,hw sum_c (student - teacher)^2_nc,hw
//   grad_student = 2 weight_map (student - teacher), which is minus the teacher's
//   squares = sum_c (student - teacher)^2, the map's gradient
//
// A null output is not computed.
struct MaskedFeatureLossParams {
  const void* student;     // (samples, channels, positions) contiguous
  const void* teacher;     // (samples, channels, positions) contiguous
  const void* weight_map;  // (samples, positions) statistics, contiguous
  void* loss;              // () statistics
  void* grad_student;      // (samples, channels, positions) contiguous, or null
  void* squares;           // (samples, positions) statistics, contiguous, or null
  int64_t samples;
  int64_t channels;
  int64_t positions;
  DType dtype;
};

// Rows of one-dimensional transport costs sum gamma |x_i - y_j|^p between the values of two rows,
// and their gradients (0 where x_i = y_j): by rank where weights are null and n = m, else along
// merged quantiles. Weights of a problem are shared by its `projections` rows. A row without
// weight, or without values, on a side is 0. float32 and float64 only. A null output is not
// computed.
struct SlicedWassersteinParams {
  const void* x;          // (rows, n) contiguous
  const void* y;          // (rows, m) contiguous
  const void* x_weights;  // (rows / projections, n) contiguous, or null: 1
  const void* y_weights;  // (rows / projections, m) contiguous, or null: 1
  void* loss;             // (rows,)
  void* grad_x;           // (rows, n) contiguous, or null
  void* grad_y;           // (rows, m) contiguous, or null
  double p;
  int64_t rows;
  int64_t projections;
  int64_t n;
  int64_t m;
  DType dtype;
};

// grad[r, :] *= scale[r], in place. A row whose scale is exactly 1 is neither read nor written.
struct ScaleRowsParams {
  void* grad;         // (rows, classes) contiguous
  const void* scale;  // (rows,) statistics, stride scale_stride (0: one scalar for every row)
  int64_t rows;
  int64_t classes;
  int64_t scale_stride;
  DType dtype;
};

// Both sides' logits x weight^T + bias, the rows' loss of them, and the gradients of what they are
// made of, on the CPU, in one call for as few rows, classes and features as stay in its caches.
//
// losses[0] says what logit_loss makes of the logits; losses[1] the same with the sides exchanged,
// for the gradients of the second side, where there are any. Their input, target, grad_input and
// strides are the kernel's own. Without a second side its x is null. Every row counts. Logits,
// sums and what lies between them are in the statistics type.
struct LinearSide {
  const void* x;       // (rows, features), row stride x_stride
  const void* weight;  // (classes, features), row stride weight_stride
  const void* bias;    // (classes,), or null
  void* grad_x;        // (rows, features) contiguous, grad_dtype, as all gradients; or null
  void* grad_weight;   // (classes, features) contiguous, or null
  void* grad_bias;     // (classes,) statistics, or null
  int64_t features;
  int64_t x_stride;
  int64_t weight_stride;
  DType dtype;
  DType grad_dtype;
};

struct SmallLinearLossParams {
  LogitLossParams losses[2];
  LinearSide sides[2];
};

// out = x weight^T + bias: bfloat16 matrices, their product summed and left in float32. On CPUs
// that multiply bfloat16 (has_bf16_linear).
struct Bf16LinearParams {
  const void* x;       // (rows, features), row stride x_stride
  const void* weight;  // (classes, features), row stride weight_stride
  const void* bias;    // (classes,), or null
  void* out;           // (rows, classes) float32, row stride out_stride
  int64_t rows;
  int64_t classes;
  int64_t features;
  int64_t x_stride;
  int64_t weight_stride;
  int64_t out_stride;
};

// What it costs to move a unit of mass from x to y.
enum class Cost : int32_t {
  kSquaredEuclidean = 0,  // |x - y|^2
  kEuclidean = 1,         // |x - y|, with derivative 0 at 0
  kCosine = 2,            // 1 - x.y; the caller gives x and y of length 1
};

// Entropic transport of each problem's rows of x, with weights a, to those of y, with weights b:
//
//   C_ij = cost(x_i, y_j) + extra_ij,  z_ij = (f_i + g_j - C_ij) / epsilon
//   OT(x, y) = sum_i a_i phi(f_i) + sum_j b_j phi(g_j) - epsilon sum_ij a_i b_j (e^z_ij - 1)
//   phi(t) = t, or rho (1 - e^(-t / rho)) where rho is finite
//   loss = OT(x, y), or with debias OT(x, y) - (OT(x, x) + OT(y, y)) / 2
//   gradients: those of loss with f and g held
//   plan_ij = a_i b_j e^z_ij, also of x with x and of y with y
//
// at the f and g that `iterations` of kdkernels/ops/sinkhorn.py give, fewer where all have changed
// by at most `tol` >= 0; 0 where a or b is. f_self and g_self are those of x with x and y with y. A
// null output is not computed. Where x is y, a is b and the three `extra` are one, the debiased
// loss and its gradients are exactly 0. A problem with a cost that is not finite is NaN.
struct SinkhornParams {
  const void* x;        // (problems, n, d), and all that follows contiguous, in the dtype
  const void* y;        // (problems, m, d)
  const void* a;        // (problems, n)
  const void* b;        // (problems, m)
  const void* extra;    // (problems, n, m), or null
  const void* extra_x;  // (problems, n, n), symmetric, or null
  const void* extra_y;  // (problems, m, m), symmetric, or null
  void* loss;           // (problems,)
  void* f;              // (problems, n)
  void* g;              // (problems, m)
  void* f_self;         // (problems, n), or null
  void* g_self;         // (problems, m), or null
  void* grad_x;         // (problems, n, d), or null
  void* grad_y;         // (problems, m, d), or null
  void* grad_a;         // (problems, n), or null
  void* grad_b;         // (problems, m), or null
  void* plan;           // (problems, n, m), or null
  void* plan_x;         // (problems, n, n), or null
  void* plan_y;         // (problems, m, m), or null
  void* scratch;        // of CUDA with debias: (3, problems) doubles, then a float for each element
                        // of the gradients that are asked for
  double epsilon;
  double rho;  // infinity: balanced
  double tol;  // < 0: none
  int64_t problems;
  int64_t n;
  int64_t m;
  int64_t d;
  int iterations;
  Cost cost;
  bool debias;
  DType dtype;  // kFloat32 or kFloat64
};

namespace cpu {
bool has_bf16_linear();
bool is_intel();
void bf16_linear(const Bf16LinearParams& params, int threads);
void coral(const PairParams& params, int threads);
void gaussian(const GaussianParams& params, int threads);
void kl_div(const KlDivParams& params, int threads);
void logit_loss(const LogitLossParams& params, int threads);
// Asks for pages of 2 MiB, with which fresh memory takes far fewer faults to fill.
void prefer_huge_pages(void* begin, int64_t bytes);
int64_t count_labels(const int64_t* labels, int64_t rows, int64_t label);  // how many are `label`
void masked_feature_loss(const MaskedFeatureLossParams& params, int threads);
void mmd(const MmdParams& params, int threads);
void multi_teacher_kl_div(const MultiTeacherKlDivParams& params, int threads);
void pool_mse(const PoolMseParams& params, int threads);
void topk_kl_div(const TopkKlDivParams& params, int threads);
void scale_rows(const ScaleRowsParams& params, int threads);
void sinkhorn(const SinkhornParams& params, int threads);
void sliced_wasserstein(const SlicedWassersteinParams& params, int threads);
void small_linear_loss(const SmallLinearLossParams& params, int threads);
// out = the sum of so many values, summed in float64; both float32 or float64.
void sum_of_rows(DType dtype, const void* rows, int64_t count, void* out);
}  // namespace cpu

// Each returns a cudaError_t (0 is success); `stream` is a cudaStream_t. float64 is not taken.
namespace cuda {
int kl_div(const KlDivParams& params, void* stream);
int logit_loss(const LogitLossParams& params, void* stream);
int multi_teacher_kl_div(const MultiTeacherKlDivParams& params, void* stream);
int pool_mse(const PoolMseParams& params, void* stream);
int topk_kl_div(const TopkKlDivParams& params, void* stream);
int scale_rows(const ScaleRowsParams& params, void* stream);
int sinkhorn(const SinkhornParams& params, void* stream);
const char* error_string(int error);
}  // namespace cuda

}  // namespace kdkernels
