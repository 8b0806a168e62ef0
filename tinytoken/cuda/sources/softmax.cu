// Short rows: a predictor's two log-probabilities, the Gumbel decision, KL between two rows of logits.

// log softmax of rows (rows, width), a warp per row
extern "C" __global__ void log_softmax_forward(const float* x, float* out, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * width;
    float most = LOWEST, total = 0.0f;
    for (int c = lane; c < width; c += WARP) most = fmaxf(most, x[first + c]);
    most = warp_max(most);
    for (int c = lane; c < width; c += WARP) total += expf(x[first + c] - most);
    total = logf(at_least(1.0f, warp_sum(total)));  // less than 1 is only the sum of nothing, 0
    for (int c = lane; c < width; c += WARP) out[first + c] = x[first + c] - most - total;
}

extern "C" __global__ void log_softmax_backward(const float* out, const float* g, float* dx, int rows, int width) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * width;
    float total = 0.0f;
    for (int c = lane; c < width; c += WARP) total += g[first + c];
    total = warp_sum(total);
    for (int c = lane; c < width; c += WARP) dx[first + c] = g[first + c] - expf(out[first + c]) * total;
}

// softmax((log_probs + noise) / tau) of rows of a few classes, one thread per row; hard: the one-hot of the first largest soft value
extern "C" __global__ void gumbel_forward(const float* log_probs, const float* noise, float* soft, float* out, int rows, int classes, float tau,
                                          int hard) {
    long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    long long first = row * classes;
    float most = LOWEST, total = 0.0f;
    int winner = 0;
    for (int k = 0; k < classes; k++) most = fmaxf(most, (log_probs[first + k] + noise[first + k]) / tau);
    for (int k = 0; k < classes; k++) {
        soft[first + k] = expf((log_probs[first + k] + noise[first + k]) / tau - most);
        total += soft[first + k];
    }
    for (int k = 0; k < classes; k++) {
        soft[first + k] /= at_least(1.0f, total);
        if (soft[first + k] > soft[first + winner]) winner = k;
    }
    if (hard)
        for (int k = 0; k < classes; k++) out[first + k] = k == winner ? 1.0f : 0.0f;
}

extern "C" __global__ void gumbel_backward(const float* soft, const float* g, float* dx, int rows, int classes, float tau) {
    long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float along = 0.0f;
    for (int k = 0; k < classes; k++) along += soft[row * classes + k] * g[row * classes + k];
    for (int k = 0; k < classes; k++) dx[row * classes + k] = soft[row * classes + k] * (g[row * classes + k] - along) / tau;
}

// log p_t - log p_s where p is p_t; where that is 0 both may be -INF
__device__ inline float gap_of(float p, float teacher, float student) { return p == 0.0f ? 0.0f : teacher - student; }

// KL(softmax(teacher) || softmax(student)) of each row from the log softmax of both, a warp per row
extern "C" __global__ void kl_forward(const float* student, const float* teacher, float* losses, int rows, int classes) {
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float total = 0.0f;
    for (int k = lane; k < classes; k += WARP) {
        long long e = (long long)row * classes + k;
        float p = expf(teacher[e]);
        total += p * gap_of(p, teacher[e], student[e]);
    }
    total = warp_sum(total);
    if (lane == 0) losses[row] = total;
}

// one thread per element: of the student's logits (p_s - p_t) g / B, of the teacher's p_t (log p_t - log p_s - KL_row) g / B
extern "C" __global__ void kl_backward(const float* student, const float* teacher, const float* losses, const float* g, float* of_student,
                                       float* of_teacher, int rows, int classes) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)rows * classes) return;
    float upstream = g[0] / rows, p = expf(teacher[e]);
    of_student[e] = (expf(student[e]) - p) * upstream;
    of_teacher[e] = p * (gap_of(p, teacher[e], student[e]) - losses[e / classes]) * upstream;
}
