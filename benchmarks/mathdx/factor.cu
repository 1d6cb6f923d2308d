// One step's linear algebra of the interior point, repeated: the matrix into place, one factor,
// three solves. With cuSolverDx in shared memory, by POTRF and 3 POTRS or by POSV and 2 POTRS, and
// with the library's own table in registers. And what cuBLASDx takes for products of that size.
#include "cuda/ipm/factor.cuh"

#define DECLARE(n, threads)                                              \
  extern "C" __device__ void potrf_##n##_##threads(float*, int*);        \
  extern "C" __device__ void potrs_##n##_##threads(float*, float*);      \
  extern "C" __device__ void posv_##n##_##threads(float*, float*, int*); \
  extern "C" __device__ void gemm_##n##_##threads(float*, float*, float*, float*, float*);

// The matrix again, from the one that is kept.
template <int n, int threads>
__device__ void Restore(const float* kept, float* M) {
  for (int i = threadIdx.x; i < n * n / 4; i += threads) {
    reinterpret_cast<float4*>(M)[i] = reinterpret_cast<const float4*>(kept)[i];
  }
  __syncthreads();
}

template <int n, int threads>
__device__ void SetRhs(const float* q, float* b) {
  for (int i = threadIdx.x; i < n; i += threads) b[i] = q[i];
  __syncthreads();
}

// M [n, n] with its diagonal; q [n]; out [n]. What = 0: the two copies alone; 1: POTRF; 2: POSV.
template <int n, int threads, typename Factor, typename Solve, typename Both>
__device__ void Cholesky(const float* matrix, const float* q, float* out, int repeat, int what,
                         Factor&& factor, Solve&& solve, Both&& both) {
  extern __shared__ float4 dynamic[];
  float* const kept = reinterpret_cast<float*>(dynamic);
  float* const M = kept + n * n;
  float* const b = M + n * n;
  float* const rhs = b + n;
  __shared__ int info;
  for (int i = threadIdx.x; i < n * n; i += threads) kept[i] = matrix[i];
  for (int i = threadIdx.x; i < n; i += threads) rhs[i] = q[i];
  __syncthreads();
  for (int r = 0; r < repeat; ++r) {
    Restore<n, threads>(kept, M);
    SetRhs<n, threads>(rhs, b);
    if (what == 2) {
      both(M, b, &info);
    } else {
      factor(M, &info);
      __syncthreads();
      solve(M, b);
    }
    __syncthreads();
    for (int s = 0; s < 2; ++s) {
      SetRhs<n, threads>(rhs, b);
      solve(M, b);
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < n; i += threads) out[i] = b[i];
}

template <int n, int threads, typename Product>
__device__ void Products(const float* matrix, float* out, int repeat, int k, Product&& product) {
  extern __shared__ float4 dynamic[];
  float* const a = reinterpret_cast<float*>(dynamic);
  float* const b = a + n * k;
  float* const c = b + n * k;
  for (int i = threadIdx.x; i < n * k; i += threads) a[i] = b[i] = matrix[i];
  for (int i = threadIdx.x; i < n * n; i += threads) c[i] = 0;
  __syncthreads();
  float one = 1e-3f;
  for (int r = 0; r < repeat; ++r) {
    product(&one, a, b, &one, c);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < n; i += threads) out[i] = c[i * n];
}

template <int n, int parts>
__device__ void Ours(const float* matrix, const float* excess, const float* q, float* out,
                     int repeat) {
  using Table = lplb::cuda::Table<n, parts>;
  __shared__ typename Table::Memory memory;
  __shared__ __align__(16) float rhs[n], zero[n], middle[n], result[n];
  Table table(memory);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    rhs[i] = q[i];
    zero[i] = 0;
  }
  float kept[Table::kColumns];
#pragma unroll
  for (int i = 0; i < Table::kColumns; ++i) {
    const int column = table.first_column() + i;
    kept[i] = column == table.row() ? 0 : -matrix[table.row() * n + column];
  }
  const float own_excess = excess[table.row()];
  __syncthreads();
  for (int r = 0; r < repeat; ++r) {
#pragma unroll
    for (int i = 0; i < Table::kColumns; ++i) table[i] = kept[i];
    table.Factor(n, own_excess);
    for (int s = 0; s < 3; ++s) table.Solve(rhs, zero, 0, middle, result);
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = result[i];
}

#define CHOLESKY(n, threads)                                                                     \
  DECLARE(n, threads)                                                                            \
  extern "C" __global__ void __launch_bounds__(threads)                                          \
      potrf_kernel_##n##_##threads(const float* m, const float* q, float* o, int r) {            \
    Cholesky<n, threads>(m, q, o, r, 1, potrf_##n##_##threads, potrs_##n##_##threads,            \
                         posv_##n##_##threads);                                                  \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(threads)                                          \
      posv_kernel_##n##_##threads(const float* m, const float* q, float* o, int r) {             \
    Cholesky<n, threads>(m, q, o, r, 2, potrf_##n##_##threads, potrs_##n##_##threads,            \
                         posv_##n##_##threads);                                                  \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(threads)                                          \
      gemm_kernel_##n##_##threads(const float* m, const float*, float* o, int r) {               \
    Products<n, threads>(m, o, r, 8, gemm_##n##_##threads);                                      \
  }

#define FULL(n, threads)                                                                           \
  extern "C" __device__ void gemm_full_##n##_##threads(float*, float*, float*, float*, float*);    \
  extern "C" __global__ void __launch_bounds__(threads)                                            \
      gemm_full_kernel_##n##_##threads(const float* m, const float*, float* o, int r) {            \
    Products<n, threads>(m, o, r, n, gemm_full_##n##_##threads);                                   \
  }

#define OURS(n, parts)                                                                         \
  extern "C" __global__ void __launch_bounds__(n* parts < 32 ? 32 : n * parts)                 \
      ours_##n(const float* m, const float* e, const float* q, float* o, int r) {              \
    Ours<n, parts>(m, e, q, o, r);                                                             \
  }

CHOLESKY(8, 32)
CHOLESKY(16, 32)
CHOLESKY(16, 64)
CHOLESKY(32, 32)
CHOLESKY(32, 64)
CHOLESKY(32, 128)
CHOLESKY(64, 64)
CHOLESKY(64, 128)
CHOLESKY(64, 256)
CHOLESKY(128, 128)
CHOLESKY(128, 256)
CHOLESKY(128, 512)
FULL(16, 32)
FULL(16, 64)
FULL(32, 32)
FULL(32, 64)
FULL(32, 128)
FULL(64, 64)
FULL(64, 128)
FULL(64, 256)
FULL(128, 128)
FULL(128, 256)
FULL(128, 512)
OURS(8, 1)
OURS(16, 2)
OURS(32, 4)
OURS(64, 4)
OURS(128, 4)
