// What stands between the products of a block in bf16: layer norm, GELU, rounding. Rows are read two numbers at a time, so widths
// are even; statistics, sums and the residual stream are float32.

extern "C" __global__ void bf16_round(const float* x, bf16x2* out, long long pairs) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < pairs) out[i] = pack(x[2 * i], x[2 * i + 1]);
}

// Layer norm of float32 rows, written as bf16; a warp per row.
extern "C" __global__ void bf16_norm_forward(const float* x, const float* weight, const float* bias, bf16x2* out, float* mean,
                                             float* scale, int rows, int width, float eps) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float2* in = (const float2*)(x + (long long)row * width);
    float total = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) total += in[c].x + in[c].y;
    float centre = warp_sum(total) / width;
    total = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) total += (in[c].x - centre) * (in[c].x - centre) + (in[c].y - centre) * (in[c].y - centre);
    float factor = 1.0f / sqrtf(warp_sum(total) / width + eps);
    if (lane == 0) {
        mean[row] = centre;
        scale[row] = factor;
    }
    for (int c = lane; c < width / 2; c += WARP)
        out[(long long)row * (width / 2) + c] = pack((in[c].x - centre) * factor * weight[2 * c] + bias[2 * c],
                                                     (in[c].y - centre) * factor * weight[2 * c + 1] + bias[2 * c + 1]);
}

// dx = the norm's gradient + the one that passes it by, on the residual stream
extern "C" __global__ void bf16_norm_backward(const float* x, const float* weight, const bf16x2* g, const float* mean, const float* scale,
                                              const float* past, float* dx, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * (width / 2);
    const float2 *in = (const float2*)x + first, *by = (const float2*)past + first, *w = (const float2*)weight;
    float centre = mean[row], factor = scale[row], sum = 0.0f, along = 0.0f;
    for (int c = lane; c < width / 2; c += WARP) {
        float u = low(g[first + c]) * w[c].x, v = high(g[first + c]) * w[c].y;
        sum += u + v;
        along += (u * (in[c].x - centre) + v * (in[c].y - centre)) * factor;
    }
    sum = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (int c = lane; c < width / 2; c += WARP) {
        float2 value;
        value.x = by[c].x + (low(g[first + c]) * w[c].x - sum - (in[c].x - centre) * factor * along) * factor;
        value.y = by[c].y + (high(g[first + c]) * w[c].y - sum - (in[c].y - centre) * factor * along) * factor;
        ((float2*)dx)[first + c] = value;
    }
}

// Kernels that add up columns: a block has a stretch of rows, first up to last, and its threads are dealt to pairs of columns (`lanes` of
// them side by side) and to every `groups`-th row. What the groups have is added in their order.
#define DEAL(pairs) \
    int first = blockIdx.x * stretch, last = min(first + stretch, rows), lanes = min((pairs + WARP - 1) / WARP * WARP, (int)blockDim.x), \
        groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes

// The sum of the groups' totals to `to`; every thread of the block comes here.
__device__ inline void add_groups(float2 total, float2* sums, int lanes, int groups, float2* to, bool inside) {
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x < lanes && inside) {
        for (int other = 1; other < groups; other++) {
            total.x += sums[other * lanes + threadIdx.x].x;
            total.y += sums[other * lanes + threadIdx.x].y;
        }
        *to = total;
    }
    __syncthreads();
}

// Gradients of the norm's weight and bias. parts, pitch, second: see norm.cu
extern "C" __global__ void bf16_norm_parameters(const float* x, const bf16x2* g, const float* mean, const float* scale, float* parts,
                                                int pitch, int second, int rows, int width, int stretch) {
    SHARED(float2, sums);
    int pairs = width / 2;
    DEAL(pairs);
    float2* part = (float2*)(parts + (long long)blockIdx.x * pitch);
    for (int c = lane; c - lane < pairs; c += lanes) {
        float2 of_weight = {0.0f, 0.0f}, of_bias = {0.0f, 0.0f};
        for (int row = first + group; c < pairs && group < groups && row < last; row += groups) {
            bf16x2 both = g[(long long)row * pairs + c];
            float2 in = ((const float2*)x)[(long long)row * pairs + c];
            of_weight.x += low(both) * (in.x - mean[row]) * scale[row];
            of_weight.y += high(both) * (in.y - mean[row]) * scale[row];
            of_bias.x += low(both);
            of_bias.y += high(both);
        }
        add_groups(of_weight, sums, lanes, groups, part + c, c < pairs);
        add_groups(of_bias, sums, lanes, groups, part + second / 2 + c, c < pairs);
    }
}

// The gradient g of a branch's output, rounded, times the branch's factor of the row's picture (`per` rows each; null: 1), and the sums of
// its columns, which is the bias's gradient.
extern "C" __global__ void bf16_round_and_sum(const float* g, const float* factor, bf16x2* out, float* parts, int pitch, int second,
                                              int rows, int width, int per, int stretch) {
    SHARED(float2, sums);
    int pairs = width / 2;
    DEAL(pairs);
    for (int c = lane; c - lane < pairs; c += lanes) {
        float2 total = {0.0f, 0.0f};
        for (int row = first + group; c < pairs && group < groups && row < last; row += groups) {
            float2 value = ((const float2*)g)[(long long)row * pairs + c];
            float times = factor ? factor[row / per] : 1.0f;
            value.x *= times;
            value.y *= times;
            out[(long long)row * pairs + c] = pack(value.x, value.y);
            total.x += value.x;
            total.y += value.y;
        }
        add_groups(total, sums, lanes, groups, (float2*)(parts + (long long)blockIdx.x * pitch) + c, c < pairs);
    }
}

extern "C" __global__ void bf16_sum(const bf16x2* values, float* parts, int pitch, int second, int rows, int width, int stretch) {
    SHARED(float2, sums);
    int pairs = width / 2;
    DEAL(pairs);
    for (int c = lane; c - lane < pairs; c += lanes) {
        float2 total = {0.0f, 0.0f};
        for (int row = first + group; c < pairs && group < groups && row < last; row += groups) {
            bf16x2 both = values[(long long)row * pairs + c];
            total.x += low(both);
            total.y += high(both);
        }
        add_groups(total, sums, lanes, groups, (float2*)(parts + (long long)blockIdx.x * pitch) + c, c < pairs);
    }
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
    SHARED(float2, sums);
    int pairs = width / 2;
    DEAL(pairs);
    for (int c = lane; c - lane < pairs; c += lanes) {
        float2 total = {0.0f, 0.0f};
        for (int row = first + group; c < pairs && group < groups && row < last; row += groups) {
            bf16x2 in = x[(long long)row * pairs + c], up = g[(long long)row * pairs + c];
            float u = low(up) * gelu_slope(low(in)), v = high(up) * gelu_slope(high(in));
            dx[(long long)row * pairs + c] = pack(u, v);
            total.x += u;
            total.y += v;
        }
        add_groups(total, sums, lanes, groups, (float2*)(parts + (long long)blockIdx.x * pitch) + c, c < pairs);
    }
}
