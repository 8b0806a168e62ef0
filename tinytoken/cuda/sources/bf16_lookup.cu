// LookupViT's two directions in bf16: M compressed tokens gather from N lookup tokens, and are infused into them by the same attention read
// backward. A block per (picture, head). q, k, v, out and their gradients are rows of tokens (B, M or N, heads d), of which a head has the
// d numbers from head d on; A (B, heads, M, N) and its gradient are float32. M is small: tensor cores would have little to do.
//
// Rows lie in shared memory, padded by one pair, so that the lanes of a warp, which read a column, meet different banks. `pairs` is d / 2.

// a head's rows: from global into shared memory
__device__ inline void load_pairs(const bf16x2* from, bf16x2* to, int heads, int rows, int pairs) {
    from += (long long)(blockIdx.x / heads) * rows * heads * pairs + blockIdx.x % heads * pairs;
    for (int e = threadIdx.x; e < rows * pairs; e += blockDim.x)
        to[e / pairs * (pairs + 1) + e % pairs] = from[(long long)(e / pairs) * heads * pairs + e % pairs];
}

__device__ inline float dot_pairs(const bf16x2* a, const bf16x2* b, int pairs) {
    float total = 0.0f;
    for (int c = 0; c < pairs; c++) total += low(a[c]) * low(b[c]) + high(a[c]) * high(b[c]);
    return total;
}

// To the row and pair of the head's part of `to`, for each thread's share of them, scale sum_i weights_i from_i; the weights of row r begin
// at weights + r along, `apart` from each other.
__device__ inline void add_rows(const float* weights, int along, int apart, const bf16x2* from, int count, bf16x2* to, int heads, int rows,
                                int pairs, float scale) {
    to += (long long)(blockIdx.x / heads) * rows * heads * pairs + blockIdx.x % heads * pairs;
    for (int e = threadIdx.x; e < rows * pairs; e += blockDim.x) {
        float u = 0.0f, v = 0.0f;
        for (int i = 0; i < count; i++) {
            float weight = weights[e / pairs * along + i * apart];
            u += weight * low(from[i * (pairs + 1) + e % pairs]);
            v += weight * high(from[i * (pairs + 1) + e % pairs]);
        }
        to[(long long)(e / pairs) * heads * pairs + e % pairs] = pack(u * scale, v * scale);
    }
}

// A = softmax over the lookup tokens of scale q k, out = A v. A warp per compressed token.
extern "C" __global__ void lookup_gather_forward(const bf16x2* q, const bf16x2* k, const bf16x2* v, bf16x2* out, float* A, int heads, int M,
                                                 int N, int pairs, float scale) {
    SHARED(bf16x2, keys);
    bf16x2 *values = keys + N * (pairs + 1), *queries = values + N * (pairs + 1);
    float* weights = (float*)(queries + M * (pairs + 1));  // (M, N)
    load_pairs(k, keys, heads, N, pairs);
    load_pairs(v, values, heads, N, pairs);
    load_pairs(q, queries, heads, M, pairs);
    __syncthreads();
    int lane = threadIdx.x % WARP;
    for (int m = threadIdx.x / WARP; m < M; m += blockDim.x / WARP) {
        float *row = weights + m * N, most = LOWEST, total = 0.0f;
        for (int n = lane; n < N; n += WARP) {
            row[n] = scale * dot_pairs(queries + m * (pairs + 1), keys + n * (pairs + 1), pairs);
            most = fmaxf(most, row[n]);
        }
        most = warp_max(most);
        for (int n = lane; n < N; n += WARP) {
            row[n] = expf(row[n] - most);
            total += row[n];
        }
        total = at_least(1.0f, warp_sum(total));
        for (int n = lane; n < N; n += WARP) {
            row[n] /= total;
            A[((long long)blockIdx.x * M + m) * N + n] = row[n];
        }
    }
    __syncthreads();
    add_rows(weights, N, 1, values, N, out, heads, M, pairs, 1.0f);
}

// Gradients from g, of out, and dA (null: none), of A: dS = A (u - sum_n A u) with u_mn = g_m v_n + dA_mn.
extern "C" __global__ void lookup_gather_backward(const bf16x2* q, const bf16x2* k, const bf16x2* v, const float* A, const bf16x2* g,
                                                  const float* dA, bf16x2* dq, bf16x2* dk, bf16x2* dv, int heads, int M, int N, int pairs,
                                                  float scale) {
    SHARED(bf16x2, keys);
    bf16x2 *values = keys + N * (pairs + 1), *queries = values + N * (pairs + 1), *upstream = queries + M * (pairs + 1);
    float *weights = (float*)(upstream + M * (pairs + 1)), *scores = weights + M * N;  // (M, N): A, dS
    load_pairs(k, keys, heads, N, pairs);
    load_pairs(v, values, heads, N, pairs);
    load_pairs(q, queries, heads, M, pairs);
    load_pairs(g, upstream, heads, M, pairs);
    __syncthreads();
    int lane = threadIdx.x % WARP;
    for (int m = threadIdx.x / WARP; m < M; m += blockDim.x / WARP) {
        long long first = ((long long)blockIdx.x * M + m) * N;
        float along = 0.0f;
        for (int n = lane; n < N; n += WARP) {
            weights[m * N + n] = A[first + n];
            scores[m * N + n] = dot_pairs(upstream + m * (pairs + 1), values + n * (pairs + 1), pairs) + (dA ? dA[first + n] : 0.0f);
            along += weights[m * N + n] * scores[m * N + n];
        }
        along = warp_sum(along);
        for (int n = lane; n < N; n += WARP) scores[m * N + n] = weights[m * N + n] * (scores[m * N + n] - along);
    }
    __syncthreads();
    add_rows(scores, N, 1, keys, N, dq, heads, M, pairs, scale);
    add_rows(scores, 1, N, queries, M, dk, heads, N, pairs, scale);
    add_rows(weights, 1, N, upstream, M, dv, heads, N, pairs, 1.0f);
}

// out = A^T v
extern "C" __global__ void lookup_infuse_forward(const float* A, const bf16x2* v, bf16x2* out, int heads, int M, int N, int pairs) {
    SHARED(bf16x2, values);
    float* weights = (float*)(values + M * (pairs + 1));
    load_pairs(v, values, heads, M, pairs);
    for (int e = threadIdx.x; e < M * N; e += blockDim.x) weights[e] = A[(long long)blockIdx.x * M * N + e];
    __syncthreads();
    add_rows(weights, 1, N, values, M, out, heads, N, pairs, 1.0f);
}

// dv = A g, dA_mn = v_m g_n
extern "C" __global__ void lookup_infuse_backward(const float* A, const bf16x2* v, const bf16x2* g, bf16x2* dv, float* dA, int heads, int M,
                                                  int N, int pairs) {
    SHARED(bf16x2, values);
    bf16x2* upstream = values + M * (pairs + 1);
    float* weights = (float*)(upstream + N * (pairs + 1));
    long long first = (long long)blockIdx.x * M * N;
    load_pairs(v, values, heads, M, pairs);
    load_pairs(g, upstream, heads, N, pairs);
    for (int e = threadIdx.x; e < M * N; e += blockDim.x) weights[e] = A[first + e];
    __syncthreads();
    for (int e = threadIdx.x; e < M * N; e += blockDim.x)
        dA[first + e] = dot_pairs(values + e / N * (pairs + 1), upstream + e % N * (pairs + 1), pairs);
    add_rows(weights, N, 1, upstream, N, dv, heads, M, pairs, 1.0f);
}
