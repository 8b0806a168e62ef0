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

// random.bits: a thread per four words. The step's number is `step`, or, of a captured step, where `clock` points.
extern "C" __global__ void random_bits(unsigned* out, long long size, unsigned site, unsigned step, const unsigned* clock, unsigned k0,
                                       unsigned k1) {
    long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * block >= size) return;
    if (clock) step = clock[0];
    unsigned word[4] = {(unsigned)block, site, step, 0};
    philox(word, k0, k1);
    for (int i = 0; i < 4; i++)
        if (4 * block + i < size) out[4 * block + i] = word[i];
}

// The chosen pictures, moved by up to `pad` pixels each way, half of them mirrored if `flip`, normalised: value * scale + offset of the
// channel, 0 outside. images (all, 3, height, width), out (batch, 3, height, width); a block per picture. Products and sums are
// rounded one by one, as the plain form's are.
extern "C" __global__ void gather_pictures(const unsigned char* images, const long long* chosen, float* out, int height, int width, int pad,
                                           int flip, unsigned crop_site, unsigned flip_site, unsigned step,
                                           const unsigned* clock, unsigned k0, unsigned k1, float scale0, float scale1,
                                           float scale2, float offset0, float offset1, float offset2) {
    SHARED(int, drawn);
    if (clock) step = clock[0];
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

// Whether (row, column) lies in picture b's rectangle; boxes (4, batch): first row, the row after the last, columns likewise.
__device__ inline bool inside_box(const int* boxes, int batch, int b, int row, int column) {
    return row >= boxes[b] && row < boxes[batch + b] && column >= boxes[2 * batch + b] && column < boxes[3 * batch + b];
}

// data.mix.erase: 0 inside of the rectangles. images, out (batch, channels, height, width); a block per picture.
extern "C" __global__ void erase_boxes(const float* images, const int* boxes, float* out, int channels, int height, int width) {
    long long first = (long long)blockIdx.x * channels * height * width;
    for (int e = threadIdx.x; e < channels * height * width; e += blockDim.x)
        out[first + e] = inside_box(boxes, gridDim.x, blockIdx.x, e / width % height, e % width) ? 0.0f : images[first + e];
}

// Whether the batch is mixed by shares (mixup), not by rectangles (cutmix): the way that is given, or of both the drawn one.
#define BY_SHARES (boxes == 0 || (shares != 0 && drawn[0] == 0))

// data.mix.mixup or cutmix of each picture with its partner in the batch's reverse order; a block per picture.
extern "C" __global__ void mix_pictures(const float* images, const float* shares, const int* boxes, const long long* drawn, float* out,
                                        int channels, int height, int width) {
    int b = blockIdx.x, size = channels * height * width;
    const float *own = images + (long long)b * size, *other = images + (long long)(gridDim.x - 1 - b) * size;
    for (int e = threadIdx.x; e < size; e += blockDim.x) {
        float value;
        if (BY_SHARES)
            value = __fadd_rn(__fmul_rn(own[e], shares[b]), __fmul_rn(other[e], 1.0f - shares[b]));
        else
            value = inside_box(boxes, gridDim.x, b, e / width % height, e % width) ? other[e] : own[e];
        out[(long long)b * size + e] = value;
    }
}

// and their targets (batch, classes): the share of each class. A thread per number.
extern "C" __global__ void mix_labels(const long long* labels, const float* shares, const int* boxes, const long long* drawn, float* targets,
                                      int batch, int classes, int height, int width) {
    int e = blockIdx.x * blockDim.x + threadIdx.x, b = e / classes, k = e % classes;
    if (b >= batch) return;
    float share;
    if (BY_SHARES)
        share = shares[b];
    else
        share = 1.0f - (float)((boxes[batch + b] - boxes[b]) * (boxes[3 * batch + b] - boxes[2 * batch + b])) / (float)(height * width);
    targets[e] = __fadd_rn(labels[b] == k ? share : 0.0f, labels[batch - 1 - b] == k ? 1.0f - share : 0.0f);
}
