// AdamW over flat storage, and the norm of the gradient. No atomics: parts, then their sum, in a fixed order.

// sum of squares of a stretch per block: values (n) -> parts (blocks)
extern "C" __global__ void squares(const float* values, float* parts, long long n) {
    SHARED(float, sums);
    float total = 0.0f;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        total += values[i] * values[i];
    sums[threadIdx.x] = total;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}

// parts (count) -> norm (1), and factor (1): what the gradient is multiplied by, so that its norm is at most `largest`. One warp.
extern "C" __global__ void clip_factor(const float* parts, float* norm, float* factor, int count, float largest) {
    float total = 0.0f;
    for (int i = threadIdx.x; i < count; i += WARP) total += parts[i];
    total = warp_sum(total);
    if (threadIdx.x) return;
    norm[0] = sqrtf(total);
    factor[0] = fminf(largest / (norm[0] + 1e-12f), 1.0f);
}

// rates (5): numbers from the host into device memory, without a copy
extern "C" __global__ void set_rates(float* rates, float lr, float first, float second, float mean_share, float step) {
    if (threadIdx.x) return;
    rates[0] = lr;
    rates[1] = first;
    rates[2] = second;
    rates[3] = mean_share;
    rates[4] = step;
}

// The number of the step, in device memory: one more
extern "C" __global__ void count_step(unsigned* clock) {
    if (threadIdx.x == 0) clock[0] += 1;
}

// One step for a group of parameters. rates: lr, 1 / (1 - b1^t), 1 / (1 - b2^t), and the share of the new weights in their running
// mean (which may be null), and the step's number t, all on the device: they change from step to step, the arguments do not. With a
// clock, rates has a row for each step from number `begin` on. The group's learning rate is 0 up to step `frozen`.
extern "C" __global__ void adamw(float* weight, float* g, float* m, float* v, float* mean, const float* factor, const float* rates,
                                 const unsigned* clock, unsigned begin, long long n, float lr_scale, float frozen, float decay,
                                 float b1, float b2, float eps) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (clock) rates += 5 * (clock[0] - begin);
    float lr = rates[4] > frozen ? rates[0] * lr_scale : 0.0f, gradient = g[i] * factor[0];
    g[i] = gradient;
    m[i] += (gradient - m[i]) * (1.0f - b1);
    v[i] += (gradient * gradient - v[i]) * (1.0f - b2);
    float change = m[i] / (sqrtf(v[i] * rates[2]) + eps) * (lr * rates[1]);
    weight[i] = weight[i] * (1.0f - lr * decay) - change;
    if (mean) mean[i] += (weight[i] - mean[i]) * rates[3];
}
