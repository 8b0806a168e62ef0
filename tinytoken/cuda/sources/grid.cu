// Pictures to tokens, and token grids to other sizes.

// Pictures (batch, channels, height, width) to patches (batch, rows columns, channels patch patch), or, `back`, the other way round. A
// thread per number of the patches.
extern "C" __global__ void patchify(const float* from, float* to, long long size, int channels, int height, int width, int patch, int back) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= size) return;
    int x = e % patch, y = e / patch % patch, channel = e / (patch * patch) % channels;
    long long token = e / (patch * patch * channels);
    int column = token % (width / patch), row = token / (width / patch) % (height / patch);
    long long picture = token / (width / patch * (height / patch));
    long long pixel = ((picture * channels + channel) * height + row * patch + y) * width + column * patch + x;
    if (back) to[pixel] = from[e];
    else to[e] = from[pixel];
}

// Tokens mixed by one matrix for all pictures: out (batch, to, width) = matrix (to, from) x (batch, from, width). One thread per element.
extern "C" __global__ void mix_tokens(const float* matrix, const float* x, float* out, int batch, int to, int from, int width) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)batch * to * width) return;
    const float *weights = matrix + e / width % to * from, *column = x + e / width / to * from * width + e % width;
    float total = 0.0f;
    for (int j = 0; j < from; j++) total += weights[j] * column[(long long)j * width];
    out[e] = total;
}
