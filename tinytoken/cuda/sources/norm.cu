// Layer norm. One warp per row; x is read from memory once, the later passes find it in the cache.

extern "C" __global__ void layer_norm_forward(const float* x, const float* weight, const float* bias, float* out, float* mean,
                                              float* scale, int rows, int width, float eps) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* in = x + (long long)row * width;
    float total = 0.0f;
    for (int c = lane; c < width; c += WARP) total += in[c];
    float centre = warp_sum(total) / width;
    total = 0.0f;
    for (int c = lane; c < width; c += WARP) total += (in[c] - centre) * (in[c] - centre);
    float factor = 1.0f / sqrtf(warp_sum(total) / width + eps);
    if (lane == 0) {
        mean[row] = centre;
        scale[row] = factor;
    }
    for (int c = lane; c < width; c += WARP) {
        float value = (in[c] - centre) * factor;
        if (weight) value *= weight[c];
        if (bias) value += bias[c];
        out[(long long)row * width + c] = value;
    }
}

extern "C" __global__ void layer_norm_backward(const float* x, const float* weight, const float* g, const float* mean,
                                               const float* scale, float* dx, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * width;
    float centre = mean[row], factor = scale[row], sum = 0.0f, along = 0.0f;
    for (int c = lane; c < width; c += WARP) {
        float u = weight ? g[first + c] * weight[c] : g[first + c];
        sum += u;
        along += u * (x[first + c] - centre) * factor;
    }
    sum = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (int c = lane; c < width; c += WARP) {
        float u = weight ? g[first + c] * weight[c] : g[first + c];
        dx[first + c] = (u - sum - (x[first + c] - centre) * factor * along) * factor;
    }
}

// Gradients of weight and bias: of a stretch of rows for each block; `sum_parts` adds the stretches. Two steps in a fixed order, where
// atomics would add in any. A block's sums are a row of `parts`, `pitch` numbers long; those of the bias begin `second` numbers after
// those of the weight.
extern "C" __global__ void layer_norm_parameters(const float* x, const float* g, const float* mean, const float* scale, float* parts,
                                                 int pitch, int second, int rows, int width, int stretch) {
    auto of = [=](long long place, int row, float* sums) {
        sums[0] += g[place] * (x[place] - mean[row]) * scale[row];
        sums[1] += g[place];
    };
    add_columns<float, 2>(of, parts, pitch, second, rows, width, stretch);
}

// Sums over rows: the gradient of a bias.
extern "C" __global__ void column_parts(const float* values, float* parts, int pitch, int second, int rows, int width, int stretch) {
    auto of = [=](long long place, int row, float* sums) { sums[0] += values[place]; };
    add_columns<float, 1>(of, parts, pitch, second, rows, width, stretch);
}

// The sum over P of the first `size` numbers of the rows of parts (P, pitch), added to what is there if `add`: columns up to `split` to
// out, the rest to second. A block has 32 columns and a warp for every (blockDim / 32)-th row, so that many rows are read at a time.
extern "C" __global__ void sum_parts(const float* parts, float* out, float* second, int pitch, int count, int size, int split,
                                     int add) {
    SHARED(float, sums);
    int column = blockIdx.x * WARP + threadIdx.x % WARP;
    float total = 0.0f;
    if (column < size)
        for (int p = threadIdx.x / WARP; p < count; p += blockDim.x / WARP) total += parts[(long long)p * pitch + column];
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= WARP || column >= size) return;
    float* to = column < split ? out + column : second + column - split;
    total = add ? *to : 0.0f;
    for (int t = threadIdx.x; t < blockDim.x; t += WARP) total += sums[t];
    *to = total;
}
