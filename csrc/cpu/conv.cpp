// Weight gradients of convolutions, one for each example: stored, squared, or summed with weights.
//
//     G[e][tap][p][c] = sum over rows r of example e and positions t of  y[r][p][t] * x[r][c][stride * t + tap]
//
// Each G is a matrix product over positions whose left factor, patches of x, is never written down: a tap is an offset
// into a padded copy of x in which the channels of a block lie next to each other, so that one vector holds as many
// channels and the tile that is kept in registers, some p times some c, runs over positions. What is copied is a
// fraction of 1 / (taps * P) and 1 / (taps * C) of the multiplications. Linear layers are convolutions with one tap.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"
#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;

// A tile's sums, vectors of them, fill three quarters of the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
constexpr int most(int vectors) { return kSums / vectors < 12 ? kSums / vectors : 12; }  // output channels in a tile

constexpr int64_t kBlock = 256;      // positions at a time: their x and y stay in the first-level cache
constexpr int64_t kPacked = 1 << 18; // numbers of y that are packed before they are used, if the examples are small

constexpr std::uintptr_t kAlign = 64;  // bytes: vectors of packed numbers do not cross cache lines

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float* aligned(double* at) {
    return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(at) + kAlign - 1) / kAlign * kAlign);
}

// How the work is cut, from the sizes alone.
struct Cut {
    bool patches;           // written down: columns are (channel, tap), and there is one tap
    int64_t taps, columns;  // columns: input channels of a group, or channel times tap
    int64_t positions;
    int vectors;                         // in a block of columns: 1 or 2
    int64_t block, blocks;               // columns in a block; how many blocks
    int64_t pieces, piece_size, larger;  // output channels: how many pieces, their size, how many have one more
    int64_t pad[3];                      // extents of the padded copy of a row of x
    int64_t chunk;                       // rows at a time: more than one where a row has few positions
    int64_t wave;                        // examples whose y is packed at a time
    int64_t parts;                       // of the weighted sum, each over some of a wave's examples
    int64_t splits;                      // of the output channels among tasks
    int64_t x_numbers, acc_numbers, y_numbers, sum_numbers, squares;

    Cut(const Conv& c, int threads, bool sum) {
        taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
        positions = c.out[0] * c.out[1] * c.out[2];
        patches = c.patches;
        columns = patches ? c.c * taps : c.c;
        if (patches) taps = 1;
        vectors = columns > kLanes ? 2 : 1;
        block = vectors * kLanes;
        blocks = ceil_div(columns, block);
        pieces = ceil_div(c.p, most(vectors));
        piece_size = c.p / pieces;
        larger = c.p % pieces;
        chunk = positions > kBlock / 2 || positions < 1 ? 1 : kBlock / positions;
        if (chunk > c.rows) chunk = c.rows;
        if (chunk < 1) chunk = 1;
        x_numbers = chunk * block;
        for (int i = 0; i < 3; ++i) {
            pad[i] = patches ? c.out[i] : (c.out[i] - 1) * c.stride[i] + (c.kernel[i] - 1) * c.dilation[i] + 1;
            x_numbers *= pad[i];
        }
        acc_numbers = taps * c.p * block;
        y_numbers = c.rows * c.groups * c.p * positions;
        const int64_t tasks = 2 * threads, columns_tasks = c.groups * blocks;
        wave = ceil_div(tasks, columns_tasks);
        if (wave < kPacked / (y_numbers + 1)) wave = kPacked / (y_numbers + 1);
        if (wave > c.examples) wave = c.examples;
        if (wave < 1) wave = 1;
        parts = sum ? ceil_div(tasks, columns_tasks) : 1;
        if (parts > wave) parts = wave;
        const int64_t found = columns_tasks * (sum ? parts : wave);
        splits = ceil_div(tasks, found);
        if (threads == 1) splits = 1;
        if (splits > pieces) splits = pieces;
        sum_numbers = sum && parts > 1 ? parts * taps * c.groups * c.p * columns : 0;
        squares = wave * columns_tasks * splits;
    }

    int64_t first(int64_t piece) const { return piece * piece_size + (piece < larger ? piece : larger); }
    int64_t size(int64_t piece) const { return piece_size + (piece < larger); }
};

// Positions of some rows' outputs: `lines` lines from (d, h) on, [w, w + width) of each; a line runs along the last
// dimension.
struct Run {
    int64_t rows, d, h, lines, w, width;
    int64_t count() const { return rows * lines * width; }
};

// All positions of `rows` rows (one, unless they have few positions) in runs of about kBlock.
template <class F>
inline void for_runs(const Conv& c, int64_t rows, F f) {
    const int64_t width = c.out[2], all = c.out[0] * c.out[1];
    const int64_t lines = width <= kBlock ? kBlock / width : 1;
    for (int64_t line = 0; line < all; line += lines) {
        const int64_t here = line + lines < all ? lines : all - line;
        for (int64_t w = 0; w < width; w += kBlock) {
            f(Run{rows, line / c.out[1], line % c.out[1], here, w, w + kBlock < width ? kBlock : width - w});
        }
    }
}

// Where x lies, padded or not: steps from one row to the next, and from one output position to the next along the three
// dimensions.
struct Source {
    const float* at;
    int64_t row_step;
    int64_t step[3];
};

// acc[m][n] += sum over a run of y[t][m] * x[t][n], in registers.
template <int M, int N>
inline void tile(const Source& x, const Conv& c, const Run& run, const float* y, float* acc, int64_t acc_step) {
    Vec sum[M][N] = {};
    const int64_t step = x.step[2];
    int64_t row = 0;
    do {  // no run is empty: loops that may not be entered would keep the sums in memory
        int64_t d = run.d, h = run.h, line = 0;
        do {
            const float* at = x.at + row * x.row_step + d * x.step[0] + h * x.step[1] + run.w * step;
            int64_t w = 0;
            do {
                Vec xs[N];
                for (int n = 0; n < N; ++n) xs[n] = *reinterpret_cast<const Loose*>(at + n * kLanes);
                for (int m = 0; m < M; ++m) {
                    for (int n = 0; n < N; ++n) sum[m][n] += y[m] * xs[n];
                }
                at += step;
                y += M;
            } while (++w < run.width);
            if (++h == c.out[1]) h = 0, ++d;
        } while (++line < run.lines);
    } while (++row < run.rows);
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            *reinterpret_cast<Loose*>(acc + m * acc_step + n * kLanes) += sum[m][n];
        }
    }
}

typedef void (*Tile)(const Source&, const Conv&, const Run&, const float*, float*, int64_t);

template <int N, int... M>
Tile tile_of(int64_t m, std::integer_sequence<int, M...>) {
    static constexpr Tile tiles[] = {tile<M + 1, N>...};
    return tiles[m - 1];
}

template <int N>
Tile tile_of(int64_t m) {
    return tile_of<N>(m, std::make_integer_sequence<int, most(N)>());
}

#ifdef __AVX2__
// Eight vectors of eight numbers, as columns.
inline void transpose(__m256 v[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xEE);
        b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        v[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

inline __m256 eight(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 eight(const Brain* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#endif

// to[w * step + j] = from[j * channel + w * position], for w < width and j < columns (0 from there to `block`).
template <class T>
inline void gather(const T* from, int64_t channel, int64_t position, int64_t width, int64_t columns, int64_t block,
                   float* to) {
    int64_t w = 0;
#ifdef __AVX2__
    if (position == 1) {
        for (; w + 8 <= width; w += 8, to += 8 * block) {
            for (int64_t first = (block - 1) / 8 * 8; first >= 0; first -= 8) {
                const int64_t count = columns - first < 8 ? columns - first : 8;
                const int64_t room = block - first < 8 ? block - first : 8;
                __m256 v[8];
                for (int64_t j = 0; j < 8; ++j) {
                    v[j] = j < count ? eight(from + (first + j) * channel + w) : _mm256_setzero_ps();
                }
                transpose(v);
                // A store of eight may reach into the next position, whose first channels are written after it (so the
                // last channels come first), but not beyond the last of these eight.
                for (int64_t i = 0; i < 8; ++i) {
                    if (i * block + first + 8 <= 8 * block) {
                        _mm256_storeu_ps(to + i * block + first, v[i]);
                    } else {
                        float last[8];
                        _mm256_storeu_ps(last, v[i]);
                        std::memcpy(to + i * block + first, last, sizeof(float) * room);
                    }
                }
            }
        }
    }
#endif
    for (; w < width; ++w, to += block) {
        const T* at = from + w * position;
        for (int64_t j = 0; j < columns; ++j) to[j] = number(at[j * channel]);
        for (int64_t j = columns; j < block; ++j) to[j] = 0;
    }
}

// Asks for memory that is read next, into the second-level cache: gathering jumps from channel to channel, which no
// prefetcher follows. It need not be there: nothing is read.
inline void ask_for(const void* memory, int64_t bytes) {
    constexpr int64_t kLine = 64, kMostBytes = 1 << 14;
    const char* at = static_cast<const char*>(memory);
    for (int64_t i = 0; i < bytes && i < kMostBytes; i += kLine) __builtin_prefetch(at + i, 0, 2);
}

// y of some rows and one group: for each run and piece of output channels [rows * positions][piece].
template <class T>
void pack_y(const Conv& c, const Cut& cut, const T* y, int64_t rows, float* out) {
    const int64_t* step = c.y_stride;  // row, channel, and the three dimensions
    ask_for(y + rows * step[0], sizeof(T) * rows * step[0]);
    for_runs(c, rows, [&](const Run& run) {
        for (int64_t piece = 0; piece < cut.pieces; ++piece) {
            const int64_t size = cut.size(piece);
            for (int64_t row = 0; row < rows; ++row) {
                const T* from = y + row * step[0] + cut.first(piece) * step[1] + run.w * step[4];
                int64_t d = run.d, h = run.h;
                for (int64_t line = 0; line < run.lines; ++line) {
                    gather(from + d * step[2] + h * step[3], step[1], step[4], run.width, size, size, out);
                    out += run.width * size;
                    if (++h == c.out[1]) h = 0, ++d;
                }
            }
        }
    });
}

// A block of columns of one row and group of x: [pad0][pad1][pad2][block], zeros outside of the image.
template <class T>
void pack_x(const Conv& c, const Cut& cut, const T* x, int64_t first, float* out) {
    const int64_t* step = c.x_stride;
    const int64_t columns = cut.columns - first < cut.block ? cut.columns - first : cut.block;
    const int64_t left = c.pad[2], right = left + c.in[2] < cut.pad[2] ? left + c.in[2] : cut.pad[2];
    for (int64_t d = 0; d < cut.pad[0]; ++d) {
        for (int64_t h = 0; h < cut.pad[1]; ++h) {
            const int64_t from_d = d - c.pad[0], from_h = h - c.pad[1];
            const int64_t line = cut.pad[2] * cut.block;
            if (from_d < 0 || from_d >= c.in[0] || from_h < 0 || from_h >= c.in[1] || right <= left) {
                std::memset(out, 0, sizeof(float) * line);
                out += line;
                continue;
            }
            std::memset(out, 0, sizeof(float) * left * cut.block);
            const T* at = x + first * step[1] + from_d * step[2] + from_h * step[3];
            gather(at, step[1], step[4], right - left, columns, cut.block, out + left * cut.block);
            std::memset(out + right * cut.block, 0, sizeof(float) * (cut.pad[2] - right) * cut.block);
            out += line;
        }
    }
}

// The same with patches written down: [positions][block], column (channel, tap).
template <class T>
void pack_patches(const Conv& c, const Cut& cut, const T* x, int64_t first, float* out) {
    const int64_t taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
    for (int64_t j = 0; j < cut.block; ++j) {
        const int64_t column = first + j, channel = column / taps, tap = column % taps;
        const int64_t kd = tap / (c.kernel[1] * c.kernel[2]), kh = tap / c.kernel[2] % c.kernel[1], kw = tap % c.kernel[2];
        float* to = out + j;
        for (int64_t d = 0; d < c.out[0]; ++d) {
            for (int64_t h = 0; h < c.out[1]; ++h) {
                const int64_t from_d = d * c.stride[0] + kd * c.dilation[0] - c.pad[0];
                const int64_t from_h = h * c.stride[1] + kh * c.dilation[1] - c.pad[1];
                const bool inside = column < cut.columns && from_d >= 0 && from_d < c.in[0] && from_h >= 0 && from_h < c.in[1];
                const T* line = x + channel * c.x_stride[1] + from_d * c.x_stride[2] + from_h * c.x_stride[3];
                for (int64_t w = 0; w < c.out[2]; ++w) {
                    const int64_t from_w = w * c.stride[2] + kw * c.dilation[2] - c.pad[2];
                    *to = inside && from_w >= 0 && from_w < c.in[2] ? number(line[from_w * c.x_stride[4]]) : 0.0f;
                    to += cut.block;
                }
            }
        }
    }
}

// What one task computes: pieces [from, to) of a group's output channels, in one block of columns.
struct Task {
    int64_t group, first;
    int64_t from, to;
};

// Whether the tiles can read x where it lies: channels next to each other, nothing outside of the image.
bool in_place(const Conv& c, const Cut& cut, int64_t first) {
    if (c.dtype != Float32 || cut.patches || c.x_stride[1] != 1 || first + cut.block > cut.columns) return false;
    for (int i = 0; i < 3; ++i) {
        if (c.pad[i] != 0 || cut.pad[i] > c.in[i]) return false;
    }
    return true;
}

// acc[tap][p][column] = the gradient of one example.
template <class T>
void example(const Conv& c, const Cut& cut, const Task& task, const T* x, const float* y, float* packed, float* acc) {
    for (int64_t tap = 0; tap < cut.taps; ++tap) {
        const int64_t from = cut.first(task.from), to = cut.first(task.to);
        std::memset(acc + (tap * c.p + from) * cut.block, 0, sizeof(float) * (to - from) * cut.block);
    }
    const bool lies_right = in_place(c, cut, task.first);
    for (int64_t row = 0; row < c.rows; row += cut.chunk) {
        const int64_t rows = row + cut.chunk < c.rows ? cut.chunk : c.rows - row;
        const T* from = x + row * c.x_stride[0] + task.group * c.c * c.x_stride[1];
        for (int64_t i = cut.chunk; i < 2 * cut.chunk; ++i) {
            ask_for(from + i * c.x_stride[0] + task.first * c.x_stride[1], sizeof(T) * cut.block * c.x_stride[1]);
        }
        Source source;
        int64_t tap_step[3];
        if (lies_right) {
            source.at = reinterpret_cast<const float*>(from) + task.first;
            source.row_step = c.x_stride[0];
            for (int i = 0; i < 3; ++i) tap_step[i] = c.x_stride[2 + i];
        } else {
            source.at = packed;
            source.row_step = cut.x_numbers / cut.chunk;
            for (int64_t i = 0; i < rows; ++i) {
                float* to = packed + i * source.row_step;
                if (cut.patches) {
                    pack_patches(c, cut, from + i * c.x_stride[0], task.first, to);
                } else {
                    pack_x(c, cut, from + i * c.x_stride[0], task.first, to);
                }
            }
            tap_step[2] = cut.block;
            tap_step[1] = cut.pad[2] * tap_step[2];
            tap_step[0] = cut.pad[1] * tap_step[1];
        }
        for (int i = 0; i < 3; ++i) {
            source.step[i] = tap_step[i] * (cut.patches ? 1 : c.stride[i]);
            tap_step[i] *= c.dilation[i];
        }
        const float* ys = y + (row * c.groups + task.group * rows) * c.p * cut.positions;
        for_runs(c, rows, [&](const Run& run) {
            for (int64_t piece = task.from; piece < task.to; ++piece) {
                const int64_t p = cut.first(piece), size = cut.size(piece);
                const Tile tile = cut.vectors == 2 ? tile_of<2>(size) : tile_of<1>(size);
                const float* at = ys + p * run.count();
                int64_t tap = 0;
                const int64_t kd = cut.patches ? 1 : c.kernel[0], kh = cut.patches ? 1 : c.kernel[1];
                const int64_t kw = cut.patches ? 1 : c.kernel[2];
                for (int64_t i = 0; i < kd; ++i) {
                    for (int64_t j = 0; j < kh; ++j) {
                        for (int64_t k = 0; k < kw; ++k, ++tap) {
                            Source tapped = source;
                            tapped.at += i * tap_step[0] + j * tap_step[1] + k * tap_step[2];
                            tile(tapped, c, run, at, acc + (tap * c.p + p) * cut.block, cut.block);
                        }
                    }
                }
            }
            ys += c.p * run.count();
        });
    }
}

// Hands rows of acc to f(row of acc, place of it in G, columns), for the pieces of a task.
template <class F>
inline void for_results(const Conv& c, const Cut& cut, const Task& task, const float* acc, F f) {
    const int64_t columns = cut.columns - task.first < cut.block ? cut.columns - task.first : cut.block;
    for (int64_t tap = 0; tap < cut.taps; ++tap) {
        for (int64_t p = cut.first(task.from); p < cut.first(task.to); ++p) {
            const int64_t place = ((tap * c.groups + task.group) * c.p + p) * cut.columns + task.first;
            f(acc + (tap * c.p + p) * cut.block, place, columns);
        }
    }
}

// Added up in double, but for a few squares at a time. Columns beyond the last are 0.
double squares(const Conv& c, const Cut& cut, const Task& task, const float* acc) {
    Wide sum;
    Vec part{};
    int rows = 0;
    for_results(c, cut, task, acc, [&](const float* row, int64_t, int64_t) {
        for (int n = 0; n < cut.vectors; ++n) {
            const Vec some = *reinterpret_cast<const Loose*>(row + n * kLanes);
            part += some * some;
        }
        if (++rows == kBrief) sum += widen(part), part = Vec{}, rows = 0;
    });
    return total(sum + widen(part));
}

void add_weighted(const Conv& c, const Cut& cut, const Task& task, const float* acc, float w, float* out) {
    for_results(c, cut, task, acc, [&](const float* row, int64_t place, int64_t columns) {
        if (columns == cut.block) {
            for (int n = 0; n < cut.vectors; ++n) {
                *reinterpret_cast<Loose*>(out + place + n * kLanes) += w * *reinterpret_cast<const Loose*>(row + n * kLanes);
            }
            return;
        }
        for (int64_t j = 0; j < columns; ++j) out[place + j] += w * row[j];
    });
}

void store(const Conv& c, const Cut& cut, const Task& task, const float* acc, float* out) {
    for_results(c, cut, task, acc, [&](const float* row, int64_t place, int64_t columns) {
        if (columns == cut.block) {
            for (int n = 0; n < cut.vectors; ++n) {
                *reinterpret_cast<Loose*>(out + place + n * kLanes) = *reinterpret_cast<const Loose*>(row + n * kLanes);
            }
            return;
        }
        std::memcpy(out + place, row, sizeof(float) * columns);
    });
}

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class T>
void run(const Conv& c, const T* x, const T* y, const float* weights, float* out, double* sq, double* scratch,
         int threads) {
    const bool sum = weights != nullptr;
    const Cut cut(c, threads, sum);
    const int64_t size = cut.taps * c.groups * c.p * cut.columns;
    double* square_parts = scratch;
    float* own = aligned(square_parts + cut.squares);
    float* partial = own + threads * (cut.x_numbers + cut.acc_numbers);
    float* packed = partial + cut.sum_numbers;
    float* sums = cut.parts > 1 ? partial : out;
    const int64_t owners = sum ? cut.parts : cut.wave;  // a wave's examples, or parts of the sum
    const int64_t chunks = ceil_div(c.rows, cut.chunk);
    const int64_t tasks = owners * c.groups * cut.blocks * cut.splits;
    if (sum) std::memset(sums, 0, sizeof(float) * cut.parts * size);
    if (!c.examples) return;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* mine = own + thread_number() * (cut.x_numbers + cut.acc_numbers);
        float* acc = mine + cut.x_numbers;
        for (int64_t begin = 0; begin < c.examples; begin += cut.wave) {
            const int64_t count = begin + cut.wave < c.examples ? cut.wave : c.examples - begin;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count * chunks * c.groups; ++i) {
                const int64_t group = i % c.groups, e = i / c.groups / chunks;
                const int64_t row = i / c.groups % chunks * cut.chunk;
                const int64_t rows = row + cut.chunk < c.rows ? cut.chunk : c.rows - row;
                if (sum && !(weights[begin + e] > 0)) continue;
                const T* from = y + ((begin + e) * c.rows + row) * c.y_stride[0] + group * c.p * c.y_stride[1];
                pack_y(c, cut, from, rows,
                       packed + e * cut.y_numbers + (row * c.groups + group * rows) * c.p * cut.positions);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; ++i) {
                const int64_t split = i % cut.splits, block = i / cut.splits % cut.blocks;
                const int64_t group = i / cut.splits / cut.blocks % c.groups;
                const int64_t owner = i / cut.splits / cut.blocks / c.groups;
                const Task task{group, block * cut.block, split * cut.pieces / cut.splits,
                                (split + 1) * cut.pieces / cut.splits};
                for (int64_t e = owner; e < count; e += owners) {
                    const float w = sum ? weights[begin + e] : 1.0f;
                    if (!(w > 0)) continue;  // contributes exactly nothing, whatever its numbers are
                    example(c, cut, task, x + (begin + e) * c.rows * c.x_stride[0], packed + e * cut.y_numbers, mine, acc);
                    if (sum) {
                        add_weighted(c, cut, task, acc, w, sums + owner * size);
                        continue;
                    }
                    if (out) store(c, cut, task, acc, out + (begin + e) * size);
                    if (sq) {
                        const int64_t per_example = tasks / owners;
                        square_parts[e * per_example + i % per_example] = squares(c, cut, task, acc);
                    }
                }
            }
            if (sq && !sum) {
#pragma omp for schedule(static)
                for (int64_t e = 0; e < count; ++e) {
                    double total = 0;
                    for (int64_t i = 0; i < tasks / owners; ++i) total += square_parts[e * (tasks / owners) + i];
                    sq[begin + e] = total;
                }
            }
        }
        if (sum && cut.parts > 1) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < size; ++i) {
                float total = 0;
                for (int64_t part = 0; part < cut.parts; ++part) total += partial[part * size + i];
                out[i] = total;
            }
        }
    }
}

}  // namespace

std::int64_t conv_scratch(const Conv& c, bool sum, int threads) {
    const Cut cut(c, threads, sum);
    const int64_t floats = cut.wave * cut.y_numbers + cut.sum_numbers + threads * (cut.x_numbers + cut.acc_numbers);
    return cut.squares + ceil_div(floats, 2) + kAlign / sizeof(double);
}

void conv_grads(const Conv& c, const void* x, const void* y, const float* weights, float* out, double* sq,
                double* scratch, int threads) {
    if (c.dtype == BFloat16) {
        run(c, static_cast<const Brain*>(x), static_cast<const Brain*>(y), weights, out, sq, scratch, threads);
    } else {
        run(c, static_cast<const float*>(x), static_cast<const float*>(y), weights, out, sq, scratch, threads);
    }
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
