// What a GPU has words for. On a CPU, tests/cuda/shim.h says the same in C++.

#define SHARED(type, name) extern __shared__ __align__(16) type name[]  // shared memory, its size given at the launch
#define FAST_EXP(x) __expf(x)  // two units in the last place, and a third of the instructions

// two floats as bf16, rounded to nearest, the first in the lower half
__device__ inline unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// c += a b, for a (16, 16), b (16, 8), c (16, 8), spread over a warp. With g = lane / 4, t = 2 (lane % 4), a lane holds
// a[g][t..t+1], a[g+8][t..], a[g][t+8..], a[g+8][t+8..]; b[t..t+1][g], b[t+8..][g]; c[g][t], c[g][t+1], c[g+8][t], c[g+8][t+1].
__device__ inline void multiply_tiles(float* c, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two (8, 8) tiles of shared memory, one below the other, as the b of multiply_tiles; lane i < 16 says where row i begins (8 numbers,
// at a multiple of 16 bytes), the other lanes' addresses are not used.
__device__ inline void load_transposed(unsigned* b, const unsigned short* row) {
    asm volatile("{.reg .u64 place; cvta.to.shared.u64 place, %2; ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [place];}"
                 : "=r"(b[0]), "=r"(b[1]) : "l"(row) : "memory");
}
