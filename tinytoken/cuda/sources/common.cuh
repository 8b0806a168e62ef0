// What all kernels share. A warp is 32 threads that run in step; sums over a row are made within a warp, always in the same
// order, so the same input gives the same bits. Constants carry an f: without it they would be doubles, and so the sums.

typedef unsigned short bf16;  // its bits: the upper half of a float's
typedef unsigned bf16x2;      // two neighbours, the first in the lower half
#define WARP 32
#define ALL 0xffffffffu
#define INF __int_as_float(0x7f800000)
#define LOWEST -3.402823466e38f  // finite, where a maximum begins: of a row of -INF, from which -INF could not be subtracted
#define SMALLEST 1.175494351e-30f  // of what is divided by: 1e8 of its reciprocals can be added up

__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, step));
    return value;
}

// the larger one, and NaN for NaN, which fmaxf would hide
__device__ inline float at_least(float least, float value) { return value < least ? least : value; }

__device__ inline float low(bf16x2 both) { return __uint_as_float(both << 16); }
__device__ inline float high(bf16x2 both) { return __uint_as_float(both & 0xffff0000u); }

__device__ inline void add(float& to, float value) { to += value; }
__device__ inline void add(float2& to, float2 value) {
    to.x += value.x;
    to.y += value.y;
}

// Sums over the rows of an array, of a stretch of rows for each block. A column is a number (V = float) or a pair (float2). Threads are dealt
// to columns, `lanes` of them side by side, and to every `groups`-th row; what the groups have is added in their order. of(place, row, sums)
// adds to the N sums of a column what a row has for them, `place` columns from the array's start. They go to the block's row of `parts`,
// `pitch` floats long, the second sums `second` floats after the first. Shared memory: a V for each thread.
template <class V, int N, class Of>
__device__ inline void add_columns(Of of, float* parts, int pitch, int second, int rows, int columns, int stretch) {
    SHARED(V, sums);
    int first = blockIdx.x * stretch, last = min(first + stretch, rows), lanes = min((columns + WARP - 1) / WARP * WARP, (int)blockDim.x);
    int groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    for (int c = lane; c - lane < columns; c += lanes) {
        V totals[N] = {};
        for (int row = first + group; c < columns && group < groups && row < last; row += groups)
            of((long long)row * columns + c, row, totals);
        for (int i = 0; i < N; i++) {
            sums[threadIdx.x] = totals[i];
            __syncthreads();
            if (threadIdx.x < lanes && c < columns) {
                for (int other = 1; other < groups; other++) add(totals[i], sums[other * lanes + threadIdx.x]);
                ((V*)(parts + (long long)blockIdx.x * pitch + i * second))[c] = totals[i];
            }
            __syncthreads();
        }
    }
}
