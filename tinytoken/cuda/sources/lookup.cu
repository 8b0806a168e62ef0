// LookupViT's way back: R^T v, R being the gather's attention read backward. A, logits and R are (heads, M, N), v (heads, M, d),
// out and g (heads, N, d); heads are those of all pictures. M is small, so each thread walks over it.

// R = A / sum_m A, with mass = that sum, or (soft) R = softmax over m of the logits. One thread per lookup token.
extern "C" __global__ void infuse_weights(const float* given, float* R, float* mass, int heads, int M, int N, int soft) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)heads * N) return;
    long long first = e / N * M * N + e % N;
    float most = 0.0f, total = 0.0f;
    if (soft) {
        most = LOWEST;
        for (int m = 0; m < M; m++) most = fmaxf(most, given[first + (long long)m * N]);
    }
    for (int m = 0; m < M; m++) total += soft ? expf(given[first + (long long)m * N] - most) : given[first + (long long)m * N];
    if (total == 0.0f) total = 1.0f;  // a column that underflowed receives nothing
    for (int m = 0; m < M; m++) {
        float value = given[first + (long long)m * N];
        R[first + (long long)m * N] = (soft ? expf(value - most) : value) / total;
    }
    mass[e] = total;
}

extern "C" __global__ void infuse_out(const float* R, const float* v, float* out, int heads, int M, int N, int d) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)heads * N * d) return;
    long long head = e / d / N, n = e / d % N, c = e % d;
    float total = 0.0f;
    for (int m = 0; m < M; m++) total += R[(head * M + m) * N + n] * v[(head * M + m) * d + c];
    out[e] = total;
}

// dv = R g: one thread per element of v
extern "C" __global__ void infuse_values(const float* R, const float* g, float* dv, int heads, int M, int N, int d) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)heads * M * d) return;
    long long row = e / d, head = row / M, c = e % d;
    float total = 0.0f;
    for (int n = 0; n < N; n++) total += R[row * N + n] * g[(head * N + n) * d + c];
    dv[e] = total;
}

// dR_mn = v_m g_n; then through R to A (divided by the mass) or to the logits (soft). One thread per lookup token walks its column twice.
extern "C" __global__ void infuse_scores(const float* R, const float* mass, const float* v, const float* g, float* d_given, int heads, int M,
                                         int N, int d, int through, int soft) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)heads * N) return;
    long long head = e / N, n = e % N;
    float along = 0.0f;
    for (int m = 0; m < M; m++) {
        float u = 0.0f;
        for (int c = 0; c < d; c++) u += v[(head * M + m) * d + c] * g[(head * N + n) * d + c];
        d_given[(head * M + m) * N + n] = u;
        along += u * R[(head * M + m) * N + n];
    }
    if (!through) return;  // R is A
    for (int m = 0; m < M; m++) {
        long long place = (head * M + m) * N + n;
        d_given[place] = (d_given[place] - along) * (soft ? R[place] : 1.0f / mass[e]);
    }
}
