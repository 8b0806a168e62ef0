// GELU, the exact form: x Phi(x), one thread per element.

extern "C" __global__ void gelu_forward(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}

extern "C" __global__ void gelu_backward(const float* x, const float* g, float* dx, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float cdf = 0.5f * (1.0f + erff(x[i] * 0.70710678f)), density = 0.39894228f * expf(-0.5f * x[i] * x[i]);
    dx[i] = g[i] * (cdf + x[i] * density);
}
