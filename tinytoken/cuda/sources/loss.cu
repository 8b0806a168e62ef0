// Softmax cross-entropy: a warp per picture. Either labels (B,) or soft targets (B, K) are given, the other is null.
// wanted_k = (1 - smoothing) t_k + smoothing / K, loss = -sum_k wanted_k log p_k, over the K classes whose logit is not -INF.

__device__ inline float target_of(const long long* labels, const float* targets, int b, int k, int classes) {
    return labels ? (labels[b] == k ? 1.0f : 0.0f) : targets[(long long)b * classes + k];
}

// smoothing / K of a row
__device__ inline float share_of(const float* row, float log_total, int classes, float smoothing) {
    float count = 0.0f;
    for (int k = threadIdx.x % WARP; k < classes; k += WARP) count += row[k] - log_total > -INF ? 1.0f : 0.0f;
    return smoothing / fmaxf(warp_sum(count), 1.0f);
}

extern "C" __global__ void cross_entropy_forward(const float* logits, const long long* labels, const float* targets, float* losses,
                                                 float* log_sum, int batch, int classes, float smoothing) {
    int b = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (b >= batch) return;
    const float* row = logits + (long long)b * classes;
    float most = LOWEST, total = 0.0f, loss = 0.0f;
    for (int k = lane; k < classes; k += WARP) most = fmaxf(most, row[k]);
    most = warp_max(most);
    for (int k = lane; k < classes; k += WARP) total += expf(row[k] - most);
    float log_total = logf(at_least(1.0f, warp_sum(total))) + most, share = share_of(row, log_total, classes, smoothing);
    for (int k = lane; k < classes; k += WARP) {
        float log_p = row[k] - log_total;
        float wanted = (1.0f - smoothing) * target_of(labels, targets, b, k, classes) + (log_p > -INF ? share : 0.0f);
        if (wanted != 0.0f) loss -= wanted * log_p;
    }
    loss = warp_sum(loss);
    if (lane == 0) {
        losses[b] = loss;
        log_sum[b] = log_total;
    }
}

// dlogits_k = (p_k sum_j wanted_j - wanted_k) g / B;  dtargets_k = -(1 - smoothing) log p_k g / B, where soft targets need one
extern "C" __global__ void cross_entropy_backward(const float* logits, const long long* labels, const float* targets,
                                                  const float* log_sum, const float* g, float* dlogits, float* dtargets, int batch,
                                                  int classes, float smoothing) {
    int b = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (b >= batch) return;
    long long first = (long long)b * classes;
    float upstream = g[0] / batch, mass = 0.0f, share = share_of(logits + first, log_sum[b], classes, smoothing);
    for (int k = lane; k < classes; k += WARP)
        mass += (1.0f - smoothing) * target_of(labels, targets, b, k, classes) + (logits[first + k] - log_sum[b] > -INF ? share : 0.0f);
    mass = warp_sum(mass);
    for (int k = lane; k < classes; k += WARP) {
        float log_p = logits[first + k] - log_sum[b], there = log_p > -INF ? 1.0f : 0.0f;
        float wanted = (1.0f - smoothing) * target_of(labels, targets, b, k, classes) + there * share;
        dlogits[first + k] = (expf(log_p) * mass - wanted) * upstream;
        if (dtargets) dtargets[first + k] = there != 0.0f ? (smoothing - 1.0f) * log_p * upstream : 0.0f;
    }
}

// values (n) -> out (1): their mean, by one block, in a fixed order.
extern "C" __global__ void mean_of(const float* values, float* out, int n) {
    SHARED(float, sums);
    float total = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) total += values[i];
    sums[threadIdx.x] = total;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[0] = sums[0] / n;
}

// mean of (x - target)^2 of each row (rows, width), a warp per row: the distance of a token from its teacher's
extern "C" __global__ void row_mse_forward(const float* x, const float* target, float* out, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float total = 0.0f;
    for (int c = lane; c < width; c += WARP) {
        float gap = x[(long long)row * width + c] - target[(long long)row * width + c];
        total += gap * gap;
    }
    total = warp_sum(total);
    if (lane == 0) out[row] = total / width;
}

// times: 1 for the gradient of x, -1 for that of the target
extern "C" __global__ void row_mse_backward(const float* x, const float* target, const float* g, float* dx, long long size, int width,
                                            float times) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e < size) dx[e] = (x[e] - target[e]) * g[e / width] * (2.0f / width) * times;
}
