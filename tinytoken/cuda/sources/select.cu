// Token selection: the k highest scores of each picture in ascending order of place, and the gather of their rows.

// rank_i = how many scores are higher, or equal and earlier: the order of a stable sort, without sorting. A block per picture, a thread
// per token. scores (B, N) -> index (B, k) int64. NaN counts as the lowest.
extern "C" __global__ void top_k(const float* scores, long long* index, int tokens, int k) {
    SHARED(float, row);
    int* kept = (int*)(row + tokens);
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
        float score = scores[(long long)blockIdx.x * tokens + i];
        row[i] = score == score ? score : -INF;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
        int rank = 0;
        for (int j = 0; j < tokens; j++) rank += row[j] > row[i] || (row[j] == row[i] && j < i);
        kept[i] = rank < k;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
        if (!kept[i]) continue;
        int place = 0;
        for (int j = 0; j < i; j++) place += kept[j];
        index[(long long)blockIdx.x * k + place] = i;
    }
}

// x (B, N, D), index (B, k) -> out (B, k, D). One thread per element of the output.
extern "C" __global__ void take_rows(const float* x, const long long* index, float* out, int batch, int tokens, int k, int width) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)batch * k * width) return;
    long long row = e / width;
    out[e] = x[((row / k) * tokens + index[row]) * width + e % width];
}

// The reverse, added up: g (B, k, D) -> out (B, N, D), zeros where no row goes. Each element looks for its rows, in their order: a row
// taken twice gets both, and no two threads add to one place.
extern "C" __global__ void put_rows(const float* g, const long long* index, float* out, int batch, int tokens, int k, int width) {
    long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= (long long)batch * tokens * width) return;
    long long row = e / width, picture = row / tokens;
    float total = 0.0f;
    for (int i = 0; i < k; i++)
        if (index[picture * k + i] == row % tokens) total += g[(picture * k + i) * width + e % width];
    out[e] = total;
}
