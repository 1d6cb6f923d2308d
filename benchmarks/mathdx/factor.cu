// One step's linear algebra of the interior point, repeated: factor M, then solve three times, with
// cuSolverDx (POTRF, POTRS in shared memory) and with the library's own table in registers.
#include "cuda/factor.cuh"

#define DECLARE(n)                                                             \
  extern "C" __device__ void potrf_##n(float*, int*);                          \
  extern "C" __device__ void potrs_##n(float*, float*);                        \
  template <>                                                                  \
  struct Cholesky<n> {                                                         \
    static __device__ void Factor(float* a, int* info) { potrf_##n(a, info); } \
    static __device__ void Solve(float* a, float* b) { potrs_##n(a, b); }      \
  };

template <int n>
struct Cholesky;
DECLARE(8)
DECLARE(16)
DECLARE(32)
DECLARE(64)
DECLARE(128)

// weights [n, n], o ≥ 0 with diagonal 0; excess [n]; q [n]; out [n].
template <int n>
__device__ void MathDx(const float* weights, const float* excess, const float* q, float* out,
                       int repeat) {
  extern __shared__ float4 dynamic[];
  float* const M = reinterpret_cast<float*>(dynamic);
  float* const b = M + n * n;
  __shared__ int info;
  for (int r = 0; r < repeat; ++r) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      float diagonal = excess[i];
      for (int j = 0; j < n; ++j) {
        diagonal += weights[i * n + j];
        M[i * n + j] = -weights[i * n + j];
      }
      M[i * n + i] = diagonal;
    }
    __syncthreads();
    Cholesky<n>::Factor(M, &info);
    __syncthreads();
    for (int s = 0; s < 3; ++s) {
      for (int i = threadIdx.x; i < n; i += blockDim.x) b[i] = q[i];
      __syncthreads();
      Cholesky<n>::Solve(M, b);
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = b[i];
}

template <int n, int parts>
__device__ void Ours(const float* weights, const float* excess, const float* q, float* out,
                     int repeat) {
  using Table = lplb::cuda::Table<n, parts>;
  __shared__ typename Table::Memory memory;
  __shared__ __align__(16) float rhs[n], zero[n], middle[n], result[n];
  Table table(memory);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    rhs[i] = q[i];
    zero[i] = 0;
  }
  __syncthreads();
  for (int r = 0; r < repeat; ++r) {
#pragma unroll
    for (int i = 0; i < Table::kColumns; ++i) {
      table[i] = weights[table.row() * n + table.first_column() + i];
    }
    table.Factor(n, excess[table.row()]);
    for (int s = 0; s < 3; ++s) table.Solve(rhs, zero, 0, middle, result);
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = result[i];
}

#define KERNELS(n, parts)                                                                         \
  extern "C" __global__ void mathdx_##n(const float* w, const float* e, const float* q, float* o, \
                                        int r) {                                                  \
    MathDx<n>(w, e, q, o, r);                                                                     \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(n* parts < 32 ? 32 : n * parts)                    \
      ours_##n(const float* w, const float* e, const float* q, float* o, int r) {                 \
    Ours<n, parts>(w, e, q, o, r);                                                                \
  }

KERNELS(8, 1)
KERNELS(16, 2)
KERNELS(32, 4)
KERNELS(64, 4)
KERNELS(128, 4)
