// What stands between the products of a block in bf16: layer norm, GELU, rounding. Rows are read two numbers at a time, so widths
// are even; statistics, sums and the residual stream are float32.

extern "C" __global__ void bf16_round(const float* x, bf16x2* out, long long pairs) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < pairs) out[i] = pack(x[2 * i], x[2 * i + 1]);
}

// Rows are float32, those of the residual stream, or bf16, queries and keys: a pair of numbers of either
__device__ inline float2 pair(const float* rows, long long i) { return ((const float2*)rows)[i]; }
__device__ inline float2 pair(const bf16x2* rows, long long i) {
    float2 value;
    value.x = low(rows[i]);
    value.y = high(rows[i]);
    return value;
}
__device__ inline void put(float* rows, long long i, float2 value) { ((float2*)rows)[i] = value; }
__device__ inline void put(bf16x2* rows, long long i, float2 value) { rows[i] = pack(value.x, value.y); }

// Layer norm, written as bf16; a warp per row.
template <class Row>
__device__ inline void norm_forward(const Row* x, const float* weight, const float* bias, bf16x2* out, float* mean, float* scale, int rows,
                                    int width, float eps) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * (width / 2);
    float total = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) total += pair(x, first + c).x + pair(x, first + c).y;
    float centre = warp_sum(total) / width;
    total = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) {
        float2 in = pair(x, first + c);
        total += (in.x - centre) * (in.x - centre) + (in.y - centre) * (in.y - centre);
    }
    float factor = 1.0f / sqrtf(warp_sum(total) / width + eps);
    if (lane == 0) {
        mean[row] = centre;
        scale[row] = factor;
    }
    for (int c = lane; c < width / 2; c += WARP) {
        float2 in = pair(x, first + c), w = pair(weight, c), b = pair(bias, c);
        out[first + c] = pack((in.x - centre) * factor * w.x + b.x, (in.y - centre) * factor * w.y + b.y);
    }
}

extern "C" __global__ void bf16_norm_forward(const float* x, const float* weight, const float* bias, bf16x2* out, float* mean,
                                             float* scale, int rows, int width, float eps) {
    norm_forward(x, weight, bias, out, mean, scale, rows, width, eps);
}

extern "C" __global__ void bf16_qk_norm_forward(const bf16x2* x, const float* weight, const float* bias, bf16x2* out, float* mean,
                                                float* scale, int rows, int width, float eps) {
    norm_forward(x, weight, bias, out, mean, scale, rows, width, eps);
}

// dx = the norm's gradient + the one that passes it by, on the residual stream (null: none)
template <class Row>
__device__ inline void norm_backward(const Row* x, const float* weight, const bf16x2* g, const float* mean, const float* scale,
                                     const float* past, Row* dx, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * (width / 2);
    float centre = mean[row], factor = scale[row], sum = 0.0f, along = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) {
        float2 in = pair(x, first + c), w = pair(weight, c), up = pair(g, first + c);
        sum += up.x * w.x + up.y * w.y;
        along += (up.x * w.x * (in.x - centre) + up.y * w.y * (in.y - centre)) * factor;
    }
    sum = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (int c = lane; c < width / 2; c += WARP) {
        float2 in = pair(x, first + c), w = pair(weight, c), up = pair(g, first + c), value;
        value.x = (up.x * w.x - sum - (in.x - centre) * factor * along) * factor;
        value.y = (up.y * w.y - sum - (in.y - centre) * factor * along) * factor;
        if (past) {
            value.x += pair(past, first + c).x;
            value.y += pair(past, first + c).y;
        }
        put(dx, first + c, value);
    }
}

extern "C" __global__ void bf16_norm_backward(const float* x, const float* weight, const bf16x2* g, const float* mean, const float* scale,
                                              const float* past, float* dx, int rows, int width) {
    norm_backward(x, weight, g, mean, scale, past, dx, rows, width);
}

extern "C" __global__ void bf16_qk_norm_backward(const bf16x2* x, const float* weight, const bf16x2* g, const float* mean,
                                                 const float* scale, const float* past, bf16x2* dx, int rows, int width) {
    norm_backward(x, weight, g, mean, scale, past, dx, rows, width);
}

// Gradients of the norm's weight and bias. parts, pitch, second: see norm.cu
template <class Row>
__device__ inline void norm_parameters(const Row* x, const bf16x2* g, const float* mean, const float* scale, float* parts, int pitch,
                                       int second, int rows, int width, int stretch) {
    auto of = [=](long long place, int row, float2* sums) {
        float2 in = pair(x, place), up = pair(g, place);
        sums[0].x += up.x * (in.x - mean[row]) * scale[row];
        sums[0].y += up.y * (in.y - mean[row]) * scale[row];
        sums[1].x += up.x;
        sums[1].y += up.y;
    };
    add_columns<float2, 2>(of, parts, pitch, second, rows, width / 2, stretch);
}

extern "C" __global__ void bf16_norm_parameters(const float* x, const bf16x2* g, const float* mean, const float* scale, float* parts,
                                                int pitch, int second, int rows, int width, int stretch) {
    norm_parameters(x, g, mean, scale, parts, pitch, second, rows, width, stretch);
}

extern "C" __global__ void bf16_qk_norm_parameters(const bf16x2* x, const bf16x2* g, const float* mean, const float* scale, float* parts,
                                                   int pitch, int second, int rows, int width, int stretch) {
    norm_parameters(x, g, mean, scale, parts, pitch, second, rows, width, stretch);
}

// The gradient g of a branch's output, rounded, times the branch's factor of the row's picture (`per` rows each; null: 1), and the sums of
// its columns, which is the bias's gradient.
extern "C" __global__ void bf16_round_and_sum(const float* g, const float* factor, bf16x2* out, float* parts, int pitch, int second,
                                              int rows, int width, int per, int stretch) {
    auto of = [=](long long place, int row, float2* sums) {
        float2 value = ((const float2*)g)[place];
        float times = factor ? factor[row / per] : 1.0f;
        value.x *= times;
        value.y *= times;
        out[place] = pack(value.x, value.y);
        sums[0].x += value.x;
        sums[0].y += value.y;
    };
    add_columns<float2, 1>(of, parts, pitch, second, rows, width / 2, stretch);
}

extern "C" __global__ void bf16_sum(const bf16x2* values, float* parts, int pitch, int second, int rows, int width, int stretch) {
    auto of = [=](long long place, int row, float2* sums) {
        sums[0].x += low(values[place]);
        sums[0].y += high(values[place]);
    };
    add_columns<float2, 1>(of, parts, pitch, second, rows, width / 2, stretch);
}

// x + factor (of the row's picture) branch
extern "C" __global__ void bf16_add_branch(const float* x, const bf16x2* branch, const float* factor, float* out, long long pairs, int width,
                                           int per) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    float times = factor[i / (width / 2) / per];
    float2 value = ((const float2*)x)[i];
    value.x += times * low(branch[i]);
    value.y += times * high(branch[i]);
    ((float2*)out)[i] = value;
}

__device__ inline float phi(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }

__device__ inline float gelu_slope(float x) { return phi(x) + x * 0.39894228f * expf(-0.5f * x * x); }

extern "C" __global__ void bf16_gelu_forward(const bf16x2* x, bf16x2* out, long long pairs) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    float u = low(x[i]), v = high(x[i]);
    out[i] = pack(u * phi(u), v * phi(v));
}

// and the sums of its columns: the gradient of the bias before it
extern "C" __global__ void bf16_gelu_backward(const bf16x2* x, const bf16x2* g, bf16x2* dx, float* parts, int pitch, int second, int rows,
                                              int width, int stretch) {
    auto of = [=](long long place, int row, float2* sums) {
        float u = low(g[place]) * gelu_slope(low(x[place])), v = high(g[place]) * gelu_slope(high(x[place]));
        dx[place] = pack(u, v);
        sums[0].x += u;
        sums[0].y += v;
    };
    add_columns<float2, 1>(of, parts, pitch, second, rows, width / 2, stretch);
}
