// Attention under a keep mask, forward and backward: a block per (picture, head), a warp per row. Keys and values of the head lie in
// shared memory, rows padded by one float so that the lanes of a warp, which read a column, meet different banks.
//
// Arrays are (B, H, T, d) with d contiguous; their strides of picture, head and token are arguments, so that the parts of a packed
// qkv are read where they are. keep (B, T) may be null; a token sees itself if `itself`. seen_ij = keep_j, or 1 on the diagonal.
// A_ij = seen_ij e_ij / sum_j seen_ij e_ij, e_ij = exp(min(s_ij - m_i, 0)), m_i the largest score with seen_ij > 0.

#define SEEN(i, j) (keep == 0 || (itself && (i) == (j)) ? 1.0f : keep[(long long)(blockIdx.x / heads) * tokens + (j)])
#define AT(array, name) array + (blockIdx.x / heads) * name##_b + (blockIdx.x % heads) * name##_h

// rows (tokens, d) with a stride into shared memory, padded
__device__ inline void load_rows(const float* from, long long stride, float* to, int tokens, int d) {
    for (int e = threadIdx.x; e < tokens * d; e += blockDim.x) to[e / d * (d + 1) + e % d] = from[e / d * stride + e % d];
}

__device__ inline float dot(const float* a, const float* b, int d) {
    float total = 0.0f;
    for (int c = 0; c < d; c++) total += a[c] * b[c];
    return total;
}

extern "C" __global__ void attention_forward(const float* q, long long q_b, long long q_h, long long q_t, const float* k, long long k_b,
                                             long long k_h, long long k_t, const float* v, long long v_b, long long v_h, long long v_t,
                                             const float* keep, float* out, float* weights, float* logits, float* highest, float* total,
                                             int heads, int queries, int tokens, int d, int itself, float scale) {
    SHARED(float, memory);
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *keys = memory, *values = keys + tokens * (d + 1), *row = values + tokens * (d + 1) + warp * (tokens + d), *query = row + tokens;
    load_rows(AT(k, k), k_t, keys, tokens, d);
    load_rows(AT(v, v), v_t, values, tokens, d);
    __syncthreads();
    const float* own = AT(q, q);
    for (int i = warp; i < queries; i += warps) {
        for (int c = lane; c < d; c += WARP) query[c] = own[i * q_t + c] * scale;
        __syncwarp();
        long long place = (long long)blockIdx.x * queries + i;
        float most = LOWEST, sum = 0.0f;
        for (int j = lane; j < tokens; j += WARP) {
            row[j] = dot(query, keys + j * (d + 1), d);
            if (logits) logits[place * tokens + j] = row[j];
            if (SEEN(i, j) > 0.0f) most = fmaxf(most, row[j]);
        }
        most = warp_max(most);
        for (int j = lane; j < tokens; j += WARP) {
            row[j] = expf(fminf(row[j] - most, 0.0f)) * SEEN(i, j);
            sum += row[j];
        }
        sum = warp_sum(sum);
        if (sum == 0.0f) sum = 1.0f;  // sees nothing: zeros
        for (int j = lane; j < tokens; j += WARP) {
            row[j] /= sum;
            if (weights) weights[place * tokens + j] = row[j];
        }
        if (lane == 0) {
            highest[place] = most;
            total[place] = sum;
        }
        __syncwarp();
        for (int c = lane; c < d; c += WARP) {
            float value = 0.0f;
            for (int j = 0; j < tokens; j++) value += row[j] * values[j * (d + 1) + c];
            out[place * d + c] = value;
        }
        __syncwarp();  // before the next row is written over this one
    }
}

// Gradients of q, and what each query's row adds up to: along_i = sum_j A_ij (g_i v_j + gA_ij). For keys and values see below.
extern "C" __global__ void attention_backward_queries(
        const float* q, long long q_b, long long q_h, long long q_t, const float* k, long long k_b, long long k_h, long long k_t,
        const float* v, long long v_b, long long v_h, long long v_t, const float* keep, const float* g, const float* g_weights,
        const float* g_logits, const float* highest, const float* total, float* along, float* dq, int heads, int queries, int tokens, int d,
        int itself, float scale) {
    SHARED(float, memory);
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *keys = memory, *values = keys + tokens * (d + 1), *row = values + tokens * (d + 1) + warp * (tokens + 2 * d);
    float *query = row + tokens, *upstream = query + d;
    load_rows(AT(k, k), k_t, keys, tokens, d);
    load_rows(AT(v, v), v_t, values, tokens, d);
    __syncthreads();
    const float* own = AT(q, q);
    for (int i = warp; i < queries; i += warps) {
        long long place = (long long)blockIdx.x * queries + i;
        for (int c = lane; c < d; c += WARP) {
            query[c] = own[i * q_t + c] * scale;
            upstream[c] = g ? g[place * d + c] : 0.0f;
        }
        __syncwarp();
        float sum = 0.0f;
        for (int j = lane; j < tokens; j += WARP) {
            float share = expf(fminf(dot(query, keys + j * (d + 1), d) - highest[place], 0.0f)) * SEEN(i, j) / total[place];
            float u = dot(upstream, values + j * (d + 1), d) + (g_weights ? g_weights[place * tokens + j] : 0.0f);
            sum += share * u;
        }
        sum = warp_sum(sum);
        if (lane == 0) along[place] = sum;
        for (int j = lane; j < tokens; j += WARP) {
            float share = expf(fminf(dot(query, keys + j * (d + 1), d) - highest[place], 0.0f)) * SEEN(i, j) / total[place];
            float u = dot(upstream, values + j * (d + 1), d) + (g_weights ? g_weights[place * tokens + j] : 0.0f);
            row[j] = (u - sum) * share + (g_logits ? g_logits[place * tokens + j] : 0.0f);
        }
        __syncwarp();
        for (int c = lane; c < d; c += WARP) {
            float value = 0.0f;
            for (int j = 0; j < tokens; j++) value += row[j] * keys[j * (d + 1) + c];
            dq[place * d + c] = value * scale;
        }
        __syncwarp();
    }
}

// Gradients of k, v and keep, a warp per key: now queries and upstream gradients lie in shared memory. dkeep (B, H, T) is summed over
// the heads by the caller; the diagonal, which does not depend on keep, is left out of it.
extern "C" __global__ void attention_backward_keys(
        const float* q, long long q_b, long long q_h, long long q_t, const float* k, long long k_b, long long k_h, long long k_t,
        const float* v, long long v_b, long long v_h, long long v_t, const float* keep, const float* g, const float* g_weights,
        const float* g_logits, const float* highest, const float* total, const float* along, float* dk, float* dv, float* dkeep, int heads,
        int queries, int tokens, int d, int itself, float scale) {
    SHARED(float, memory);
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *asks = memory, *upstream = asks + queries * (d + 1), *row = upstream + queries * (d + 1) + warp * 2 * (queries + d);
    float *shares = row + queries, *key = shares + queries, *value = key + d;
    long long first = (long long)blockIdx.x * queries;
    load_rows(AT(q, q), q_t, asks, queries, d);
    for (int e = threadIdx.x; e < queries * d; e += blockDim.x) upstream[e / d * (d + 1) + e % d] = g ? g[first * d + e] : 0.0f;
    __syncthreads();
    const float *own_keys = AT(k, k), *own_values = AT(v, v);
    for (int j = warp; j < tokens; j += warps) {
        for (int c = lane; c < d; c += WARP) {
            key[c] = own_keys[j * k_t + c] * scale;
            value[c] = own_values[j * v_t + c];
        }
        __syncwarp();
        float of_keep = 0.0f;
        for (int i = lane; i < queries; i += WARP) {
            long long place = first + i;
            float slope = expf(fminf(dot(key, asks + i * (d + 1), d) - highest[place], 0.0f));
            float u = dot(value, upstream + i * (d + 1), d) + (g_weights ? g_weights[place * tokens + j] : 0.0f) - along[place];
            shares[i] = slope * SEEN(i, j) / total[place];
            row[i] = u * shares[i] + (g_logits ? g_logits[place * tokens + j] : 0.0f);
            if (!itself || i != j) of_keep += u * (slope / at_least(SMALLEST, total[place]));
        }
        if (dkeep) {
            of_keep = warp_sum(of_keep);
            if (lane == 0) dkeep[(long long)blockIdx.x * tokens + j] = of_keep;
        }
        __syncwarp();
        long long place = ((long long)blockIdx.x * tokens + j) * d;
        for (int c = lane; c < d; c += WARP) {
            float of_key = 0.0f, of_value = 0.0f;
            for (int i = 0; i < queries; i++) {
                of_key += row[i] * asks[i * (d + 1) + c];
                of_value += shares[i] * upstream[i * (d + 1) + c];
            }
            dk[place + c] = of_key * scale;
            dv[place + c] = of_value;
        }
        __syncwarp();
    }
}
