// Random bits, and batches of pictures from a set that lies on the device.

// Philox4x32-10 of one counter: see tinytoken/random.py, whose bits these are
__device__ inline void philox(unsigned* word, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * word[0], p1 = 0xCD9E8D57ull * word[2];
        word[0] = (unsigned)(p1 >> 32) ^ word[1] ^ k0;
        word[1] = (unsigned)p1;
        word[2] = (unsigned)(p0 >> 32) ^ word[3] ^ k1;
        word[3] = (unsigned)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// element i of random.integers(..., high)
__device__ inline int integer(int i, unsigned high, unsigned site, unsigned step, unsigned k0, unsigned k1) {
    unsigned word[4] = {(unsigned)i / 4, site, step, 0};
    philox(word, k0, k1);
    return (int)((unsigned long long)word[i % 4] * high >> 32);
}

// random.bits: a thread per four words
extern "C" __global__ void random_bits(unsigned* out, long long size, unsigned site, unsigned step, unsigned k0, unsigned k1) {
    long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * block >= size) return;
    unsigned word[4] = {(unsigned)block, site, step, 0};
    philox(word, k0, k1);
    for (int i = 0; i < 4; i++)
        if (4 * block + i < size) out[4 * block + i] = word[i];
}

// The chosen pictures, moved by up to `pad` pixels each way, half of them mirrored if `flip`, normalised: value * scale + offset of the
// channel, 0 outside. images (all, 3, height, width), out (batch, 3, height, width); a block per picture. Products and sums are
// rounded one by one, as the plain form's are.
extern "C" __global__ void gather_pictures(const unsigned char* images, const long long* chosen, float* out, int height, int width, int pad,
                                           int flip, unsigned crop_site, unsigned flip_site, unsigned step, unsigned k0, unsigned k1,
                                           float scale0, float scale1, float scale2, float offset0, float offset1, float offset2) {
    SHARED(int, drawn);
    if (threadIdx.x < 2) drawn[threadIdx.x] = pad ? integer(2 * blockIdx.x + threadIdx.x, 2 * pad + 1, crop_site, step, k0, k1) - pad : 0;
    if (threadIdx.x == 2) drawn[2] = flip ? integer(blockIdx.x, 2, flip_site, step, k0, k1) : 0;
    __syncthreads();
    const unsigned char* picture = images + chosen[blockIdx.x] * 3 * height * width;
    for (int e = threadIdx.x; e < 3 * height * width; e += blockDim.x) {
        int channel = e / (height * width), x = e % width;
        int row = e / width % height + drawn[0], column = (drawn[2] ? width - 1 - x : x) + drawn[1];
        bool inside = row >= 0 && row < height && column >= 0 && column < width;
        float scale = channel == 0 ? scale0 : channel == 1 ? scale1 : scale2;
        float offset = channel == 0 ? offset0 : channel == 1 ? offset1 : offset2;
        float value = inside ? (float)picture[(channel * height + row) * width + column] : 0.0f;
        out[(long long)blockIdx.x * 3 * height * width + e] = inside ? __fadd_rn(__fmul_rn(value, scale), offset) : 0.0f;
    }
}
