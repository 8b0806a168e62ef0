// Attention in bf16 on tensor cores: a block per (picture, head), a warp per 16 rows. Keys, values and what else is read again lie in
// shared memory, rows padded by 8 numbers, so that what a warp reads at once lies in different banks. HEAD_DIM is a constant of the compilation.
//
// qkv (B, T, 3, H, d) is read and dqkv written where the products before and after want them; out and g are (B, T, H, d). keep (B, T)
// may be null; a token sees itself if `itself`. The formula is the one of attention.cu, its sums of 16 keys at a time.

#define STRIDE (HEAD_DIM + 8)
#define STEPS (HEAD_DIM / 16)  // of a product over the head's dimension
#define TILES (HEAD_DIM / 8)   // columns of 8 of its rows

// rows of `stride` numbers, the first `tokens` of them from memory, zeros up to `padded`
__device__ inline void load_rows(const bf16* from, long long stride, bf16* to, int tokens, int padded) {
    for (int e = threadIdx.x; e < padded * TILES; e += blockDim.x) {
        uint4 value = {0, 0, 0, 0};
        if (e / TILES < tokens) value = *(const uint4*)(from + e / TILES * stride + e % TILES * 8);
        *(uint4*)(to + e / TILES * STRIDE + e % TILES * 8) = value;
    }
}

// whether key j is seen by all but itself; beyond the last token: not. A keep whose share bf16 could not hold is none.
__device__ inline void load_seen(const float* keep, float* seen, int tokens, int padded) {
    for (int j = threadIdx.x; j < padded; j += blockDim.x) seen[j] = j >= tokens || (keep && keep[j] < SMALLEST) ? 0.0f : keep ? keep[j] : 1.0f;
}

// rows i..i+15 of shared memory as the a of multiply_tiles, for each step over d
__device__ inline void load_a(const bf16* rows, int i, unsigned (*a)[4]) {
    const bf16* own = rows + (i + threadIdx.x % WARP / 4) * STRIDE + threadIdx.x % 4 * 2;
    for (int s = 0; s < STEPS; s++)
        for (int part = 0; part < 4; part++) a[s][part] = *(const unsigned*)(own + part % 2 * 8 * STRIDE + s * 16 + part / 2 * 8);
}

// c (16, 16) = a (16, d) times the rows j..j+15 transposed
__device__ inline void times_rows(float (*c)[4], unsigned (*a)[4], const bf16* rows, int j) {
    for (int half = 0; half < 2; half++) {
        const bf16* own = rows + (j + half * 8 + threadIdx.x % WARP / 4) * STRIDE + threadIdx.x % 4 * 2;
        for (int part = 0; part < 4; part++) c[half][part] = 0.0f;
        for (int s = 0; s < STEPS; s++) {
            unsigned b[2] = {*(const unsigned*)(own + s * 16), *(const unsigned*)(own + s * 16 + 8)};
            multiply_tiles(c[half], a[s], b);
        }
    }
}

// sum (16, d) += c (16, 16) times the rows j..j+15
__device__ inline void add_times(float (*sum)[4], float (*c)[4], const bf16* rows, int j) {
    unsigned a[4] = {pack(c[0][0], c[0][1]), pack(c[0][2], c[0][3]), pack(c[1][0], c[1][1]), pack(c[1][2], c[1][3])};
    for (int n = 0; n < TILES; n++) {
        unsigned b[2];
        load_transposed(b, rows + (j + threadIdx.x % 16) * STRIDE + n * 8);
        multiply_tiles(sum[n], a, b);
    }
}

// (16, d), rows times a factor each, as bf16 to memory
__device__ inline void store_rows(float (*sum)[4], bf16* to, long long stride, int i, int tokens, float first, float second) {
    int row = i + threadIdx.x % WARP / 4;
    for (int n = 0; n < TILES; n++) {
        int column = n * 8 + threadIdx.x % 4 * 2;
        if (row < tokens) *(unsigned*)(to + row * stride + column) = pack(sum[n][0] * first, sum[n][1] * first);
        if (row + 8 < tokens) *(unsigned*)(to + (row + 8) * stride + column) = pack(sum[n][2] * second, sum[n][3] * second);
    }
}

// over the four lanes that share a row
__device__ inline float row_sum(float value) {
    value += __shfl_xor_sync(ALL, value, 1);
    return value + __shfl_xor_sync(ALL, value, 2);
}

__device__ inline float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(ALL, value, 1));
    return fmaxf(value, __shfl_xor_sync(ALL, value, 2));
}

// Sums go along with the largest score so far, and are scaled down when it grows (Milakov & Gimelshein 2018).
extern "C" __global__ void bf16_attention_forward(const bf16* qkv, const float* keep, bf16* out, float* highest, float* total, int heads,
                                                  int tokens, int itself, float scale) {
    SHARED(bf16, memory);
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, padded = (tokens + 15) / 16 * 16, picture = blockIdx.x / heads;
    long long width = heads * HEAD_DIM, place = (long long)blockIdx.x * tokens;
    const bf16* own = qkv + picture * tokens * 3 * width + blockIdx.x % heads * HEAD_DIM;
    bf16 *keys = memory, *values = keys + padded * STRIDE, *asks = values + padded * STRIDE;
    float* seen = (float*)(asks + padded * STRIDE);
    load_rows(own, 3 * width, asks, tokens, padded);
    load_rows(own + width, 3 * width, keys, tokens, padded);
    load_rows(own + 2 * width, 3 * width, values, tokens, padded);
    load_seen(keep ? keep + (long long)picture * tokens : 0, seen, tokens, padded);
    __syncthreads();
    for (int i = warp * 16; i < tokens; i += warps * 16) {
        unsigned query[STEPS][4];
        load_a(asks, i, query);
        int row = i + threadIdx.x % WARP / 4;
        float sum[TILES][4] = {}, most[2] = {LOWEST, LOWEST}, mass[2] = {0.0f, 0.0f};
        for (int j = 0; j < padded; j += 16) {
            float score[2][4], see[2][4], top[2] = {most[0], most[1]};
            times_rows(score, query, keys, j);
            for (int e = 0; e < 8; e++) {
                int lower = e / 2 % 2, key = j + e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
                see[e / 4][e % 4] = itself && key == row + lower * 8 && key < tokens ? 1.0f : seen[key];
                score[e / 4][e % 4] *= scale;
                if (see[e / 4][e % 4] > 0.0f) top[lower] = fmaxf(top[lower], score[e / 4][e % 4]);
            }
            for (int lower = 0; lower < 2; lower++) {
                top[lower] = row_max(top[lower]);
                float shrink = FAST_EXP(most[lower] - top[lower]);
                mass[lower] *= shrink;
                for (int n = 0; n < TILES; n++) {
                    sum[n][2 * lower] *= shrink;
                    sum[n][2 * lower + 1] *= shrink;
                }
                most[lower] = top[lower];
            }
            for (int e = 0; e < 8; e++) {
                int lower = e / 2 % 2;
                score[e / 4][e % 4] = FAST_EXP(fminf(score[e / 4][e % 4] - most[lower], 0.0f)) * see[e / 4][e % 4];
                mass[lower] += score[e / 4][e % 4];
            }
            add_times(sum, score, values, j);
        }
        for (int lower = 0; lower < 2; lower++) {
            mass[lower] = row_sum(mass[lower]);
            if (mass[lower] == 0.0f) mass[lower] = 1.0f;  // sees nothing: zeros
            if (threadIdx.x % 4 == 0 && row + lower * 8 < tokens) {
                highest[place + row + lower * 8] = most[lower];
                total[place + row + lower * 8] = mass[lower];
            }
        }
        store_rows(sum, out + picture * tokens * width + blockIdx.x % heads * HEAD_DIM, width, i, tokens, 1.0f / mass[0], 1.0f / mass[1]);
    }
}

// dqkv, and dkeep (B, H, T) if keep is given, which the caller sums over the heads. along_i = g_i out_i is what row i of the attention
// adds up to. First each warp takes 16 queries and goes over all keys, then 16 keys and goes over all queries: scores are
// computed twice, and no two warps ever add to the same place.
extern "C" __global__ void bf16_attention_backward(const bf16* qkv, const float* keep, const bf16* out, const bf16* g, const float* highest,
                                                   const float* total, bf16* dqkv, float* dkeep, int heads, int tokens, int itself,
                                                   float scale) {
    SHARED(bf16, memory);
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, padded = (tokens + 15) / 16 * 16, picture = blockIdx.x / heads;
    long long width = heads * HEAD_DIM, place = (long long)blockIdx.x * tokens;
    long long first = picture * tokens * 3 * width + blockIdx.x % heads * HEAD_DIM;
    bf16 *asks = memory, *keys = asks + padded * STRIDE, *values = keys + padded * STRIDE, *upstream = values + padded * STRIDE;
    float *seen = (float*)(upstream + padded * STRIDE), *most = seen + padded, *mass = most + padded, *along = mass + padded;
    const bf16* given = g + picture * tokens * width + blockIdx.x % heads * HEAD_DIM;
    const bf16* gave = out + picture * tokens * width + blockIdx.x % heads * HEAD_DIM;
    load_rows(qkv + first, 3 * width, asks, tokens, padded);
    load_rows(qkv + first + width, 3 * width, keys, tokens, padded);
    load_rows(qkv + first + 2 * width, 3 * width, values, tokens, padded);
    load_rows(given, width, upstream, tokens, padded);
    load_seen(keep ? keep + (long long)picture * tokens : 0, seen, tokens, padded);
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        float sum = 0.0f;
        for (int c = 0; i < tokens && c < HEAD_DIM; c += 2) {
            unsigned u = *(const unsigned*)(given + i * width + c), v = *(const unsigned*)(gave + i * width + c);
            sum += low(u) * low(v) + high(u) * high(v);
        }
        along[i] = sum;
        most[i] = i < tokens ? highest[place + i] : 0.0f;
        mass[i] = i < tokens ? 1.0f / total[place + i] : 1.0f;
    }
    __syncthreads();
    for (int i = warp * 16; i < tokens; i += warps * 16) {
        unsigned query[STEPS][4], up[STEPS][4];
        load_a(asks, i, query);
        load_a(upstream, i, up);
        int row = i + threadIdx.x % WARP / 4;
        float sum[TILES][4] = {};
        for (int j = 0; j < padded; j += 16) {
            float score[2][4], slope[2][4];
            times_rows(score, query, keys, j);
            times_rows(slope, up, values, j);
            for (int e = 0; e < 8; e++) {
                int asker = row + e / 2 % 2 * 8, key = j + e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
                float see = itself && key == asker && key < tokens ? 1.0f : seen[key];
                float share = FAST_EXP(fminf(score[e / 4][e % 4] * scale - most[asker], 0.0f)) * mass[asker] * see;
                score[e / 4][e % 4] = share * (slope[e / 4][e % 4] - along[asker]);
            }
            add_times(sum, score, keys, j);
        }
        store_rows(sum, dqkv + first, 3 * width, i, tokens, scale, scale);
    }
    for (int j = warp * 16; j < tokens; j += warps * 16) {
        unsigned key_rows[STEPS][4], value_rows[STEPS][4];
        load_a(keys, j, key_rows);
        load_a(values, j, value_rows);
        int row = j + threadIdx.x % WARP / 4;
        float of_keys[TILES][4] = {}, of_values[TILES][4] = {}, of_keep[2] = {0.0f, 0.0f};
        for (int i = 0; i < padded; i += 16) {
            float score[2][4], slope[2][4];
            times_rows(score, key_rows, asks, i);
            times_rows(slope, value_rows, upstream, i);
            for (int e = 0; e < 8; e++) {
                int lower = e / 2 % 2, key = row + lower * 8, asker = i + e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
                bool own = itself && key == asker && key < tokens;
                float share = FAST_EXP(fminf(score[e / 4][e % 4] * scale - most[asker], 0.0f)) * mass[asker];
                float change = slope[e / 4][e % 4] - along[asker];
                if (!own) of_keep[lower] += share * change;
                share *= own ? 1.0f : seen[key];
                score[e / 4][e % 4] = share * change;
                slope[e / 4][e % 4] = share;
            }
            add_times(of_keys, score, asks, i);
            add_times(of_values, slope, upstream, i);
        }
        store_rows(of_keys, dqkv + first + width, 3 * width, j, tokens, scale, scale);
        store_rows(of_values, dqkv + first + 2 * width, 3 * width, j, tokens, 1.0f, 1.0f);
        for (int lower = 0; dkeep && lower < 2; lower++) {
            of_keep[lower] = row_sum(of_keep[lower]);
            if (threadIdx.x % 4 == 0 && row + lower * 8 < tokens) dkeep[place + row + lower * 8] = of_keep[lower];
        }
    }
}
