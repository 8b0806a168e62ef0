// What all kernels share. A warp is 32 threads that run in step; sums over a row are made within a warp, always in the same
// order, so the same input gives the same bits. Constants carry an f: without it they would be doubles, and so the sums.

typedef unsigned short bf16;  // its bits: the upper half of a float's
typedef unsigned bf16x2;      // two neighbours, the first in the lower half
#define WARP 32
#define ALL 0xffffffffu
#define INF __int_as_float(0x7f800000)

__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, step));
    return value;
}

__device__ inline float low(bf16x2 both) { return __uint_as_float(both << 16); }
__device__ inline float high(bf16x2 both) { return __uint_as_float(both & 0xffff0000u); }
