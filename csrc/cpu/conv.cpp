// Weight gradients of convolutions, one for each example: stored, squared, or summed with weights.
//
//     G[e][tap][p][c] = sum over rows r of example e and positions t of  y[r][p][t] * x[r][c][stride * t + tap]
//
// Each G is a matrix product over positions whose left factor, patches of x, is never written down: a tap is an offset
// into a padded copy of x in which the channels of a block lie next to each other, so that one vector holds as many
// channels and the tile that is kept in registers, some p times some c, runs over positions. What is copied is a
// fraction of 1 / (taps * P) and 1 / (taps * C) of the multiplications. Linear layers are convolutions with one tap.
//
// What is copied are words of 32 bits: a number in float, or, where the processor multiplies bfloat16 (AVX512-BF16), the
// numbers of two output positions that follow each other. In x every position starts a word, so that at every tap a pair
// is one word, unless there is but one tap along a line.
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
constexpr int64_t kPacked = 1 << 18; // words of y that are packed before they are used, if the examples are small

constexpr std::uintptr_t kAlign = 64;  // bytes: vectors of packed numbers do not cross cache lines

#ifdef __AVX512BF16__
constexpr bool kPairs = true;  // whether there are instructions for bfloat16
#else
constexpr bool kPairs = false;
#endif

static_assert(kBlock % 2 == 0, "a pair of positions is in one block");

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float* aligned(double* at) {
    return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(at) + kAlign - 1) / kAlign * kAlign);
}

// How the work is cut, from the sizes alone.
struct Cut {
    bool patches;           // written down: columns are (channel, tap), and there is one tap
    int64_t taps, columns;  // columns: input channels of a group, or channel times tap
    int word;               // positions in a word: 1, or 2 where bfloat16 is multiplied
    bool apart;             // the words of x do not overlap: a line's positions are used once each, and all of them
    int64_t words;          // of y, for a row and an output channel
    int vectors;                         // in a block of columns: 1 or 2
    int64_t block, blocks;               // columns in a block; how many blocks
    int64_t pieces, piece_size, larger;  // output channels: how many pieces, their size, how many have one more
    int64_t pad[3];                      // extents of the padded copy of a row of x, the last one in words
    int64_t chunk;                       // rows at a time: more than one where a row has few positions
    int64_t wave;                        // examples whose y is packed at a time
    int64_t parts;                       // of the weighted sum, each over some of a wave's examples
    int64_t splits;                      // of the output channels among tasks
    int64_t x_words, acc_numbers, y_words, sum_numbers, squares;

    Cut(const Conv& c, int threads, bool sum) {
        taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
        patches = c.patches;
        word = kPairs && c.dtype == BFloat16 && !patches ? 2 : 1;
        words = c.out[0] * c.out[1] * ceil_div(c.out[2], word);
        apart = word > 1 && c.kernel[2] == 1 && c.stride[2] == 1 && c.pad[2] == 0 && c.in[2] == c.out[2];
        columns = patches ? c.c * taps : c.c;
        if (patches) taps = 1;
        vectors = columns > kLanes ? 2 : 1;
        block = vectors * kLanes;
        blocks = ceil_div(columns, block);
        pieces = ceil_div(c.p, most(vectors));
        piece_size = c.p / pieces;
        larger = c.p % pieces;
        chunk = words > kBlock / 2 || words < 1 ? 1 : kBlock / words;
        if (chunk > c.rows) chunk = c.rows;
        if (chunk < 1) chunk = 1;
        x_words = chunk * block;
        for (int i = 0; i < 3; ++i) {
            pad[i] = patches ? c.out[i] : (c.out[i] - 1) * c.stride[i] + (c.kernel[i] - 1) * c.dilation[i] + 1;
            if (apart && i == 2) pad[i] = ceil_div(pad[i], word);
            x_words *= pad[i];
        }
        acc_numbers = taps * c.p * block;
        y_words = c.rows * c.groups * c.p * words;
        const int64_t tasks = 2 * threads, columns_tasks = c.groups * blocks;
        wave = ceil_div(tasks, columns_tasks);
        if (wave < kPacked / (y_words + 1)) wave = kPacked / (y_words + 1);
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
    int64_t words(int word) const { return rows * lines * ceil_div(width, word); }
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

// Where x lies, padded or not: steps, in words, from one row to the next, from one output position to the next along the
// first two dimensions, and from one word of y to the next.
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

#ifdef __AVX512BF16__
// The same, two positions in a word and in a multiplication.
template <int M, int N>
inline void tile_of_pairs(const Source& x, const Conv& c, const Run& run, const float* y, float* acc, int64_t acc_step) {
    Vec sum[M][N] = {};
    const int64_t step = x.step[2];
    int64_t row = 0;
    do {
        int64_t d = run.d, h = run.h, line = 0;
        do {
            const float* at = x.at + row * x.row_step + d * x.step[0] + h * x.step[1] + run.w / 2 * step;
            int64_t left = run.width;
            do {
                __m512i xs[N];
                for (int n = 0; n < N; ++n) {
                    xs[n] = _mm512_loadu_si512(at + n * kLanes);
                    if (left == 1) xs[n] = _mm512_and_si512(xs[n], _mm512_set1_epi32(0xFFFF));  // a line's end
                }
                for (int m = 0; m < M; ++m) {
                    const __m512bh ym = reinterpret_cast<__m512bh>(_mm512_set1_ps(y[m]));
                    for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], ym, reinterpret_cast<__m512bh>(xs[n]));
                }
                at += step;
                y += M;
                left -= 2;
            } while (left > 0);
            if (++h == c.out[1]) h = 0, ++d;
        } while (++line < run.lines);
    } while (++row < run.rows);
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            *reinterpret_cast<Loose*>(acc + m * acc_step + n * kLanes) += sum[m][n];
        }
    }
}
#endif

typedef void (*Tile)(const Source&, const Conv&, const Run&, const float*, float*, int64_t);

template <int N, int... M>
Tile tile_of(int64_t m, int word, std::integer_sequence<int, M...>) {
#ifdef __AVX512BF16__
    static constexpr Tile of_pairs[] = {tile_of_pairs<M + 1, N>...};
    if (word == 2) return of_pairs[m - 1];
#endif
    (void)word;
    static constexpr Tile tiles[] = {tile<M + 1, N>...};
    return tiles[m - 1];
}

Tile tile_of(int64_t m, int vectors, int word) {
    return vectors == 2 ? tile_of<2>(m, word, std::make_integer_sequence<int, most(2)>())
                        : tile_of<1>(m, word, std::make_integer_sequence<int, most(1)>());
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

// Lines of several channels that are packed, `channel` and `position` numbers from one to the next. Here a word is one
// number.
template <class T>
struct Numbers {
    const T* at;
    int64_t channel, position;

    float word(int64_t j, int64_t w) const { return number(at[j * channel + w * position]); }
    void words(int64_t w, int64_t columns, float* to) const {  // of channels that follow each other
        for (int64_t j = 0; j < columns; ++j) to[j] = number(at[j + w * position]);
    }

#ifdef __AVX2__
    static constexpr bool kBeyond = false;  // whether words may be asked for that lie beyond the line
    struct Eight {  // eight words of a channel from w on; position is 1
        const T* at;
        int64_t channel;
        Eight(const Numbers& line, int64_t w) : at(line.at + w), channel(line.channel) {}
        __m256 operator()(int64_t j) const { return eight(at + j * channel); }
    };
#endif
};

#ifdef __AVX512BF16__
inline float pair(Brain first, Brain second) {
    const std::uint32_t bits = first.bits | static_cast<std::uint32_t>(second.bits) << 16;
    float word;
    std::memcpy(&word, &bits, sizeof word);
    return word;
}

// Bits [from, to) of 16.
inline __mmask16 mask(int64_t from, int64_t to) {
    const int64_t low = from < 0 ? 0 : from > 16 ? 16 : from, high = to < low ? low : to > 16 ? 16 : to;
    return static_cast<__mmask16>((1u << high) - (1u << low));
}

// Pairs of numbers, one of each of two positions, for `count` channels that follow each other; where a position is
// missing (null), its number is 0.
inline void pairs(const Brain* first, const Brain* second, int64_t count, float* to) {
    for (int64_t j = 0; j < count; j += kLanes) {
        const __mmask16 here = mask(0, count - j);
        const __m256i none = _mm256_setzero_si256();
        const __m256i low = first ? _mm256_maskz_loadu_epi16(here, first + j) : none;
        const __m256i high = second ? _mm256_maskz_loadu_epi16(here, second + j) : none;
        const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_mask_storeu_epi32(to + j, here, both);
    }
}

// The numbers 2 w and 2 w + 1 of a line of `length`; 0 beyond it.
struct PairsAlong {
    const Brain* at;
    int64_t channel, position, length;

    float word(int64_t j, int64_t w) const {
        const Brain* first = at + j * channel + 2 * w * position;
        return pair(*first, 2 * w + 1 < length ? first[position] : Brain{0});
    }
    void words(int64_t w, int64_t columns, float* to) const {
        const Brain* first = at + 2 * w * position;
        pairs(first, 2 * w + 1 < length ? first + position : nullptr, columns, to);
    }

    static constexpr bool kBeyond = true;
    struct Eight {
        const Brain* at;
        int64_t channel;
        __mmask16 inside;
        Eight(const PairsAlong& line, int64_t w)
            : at(line.at + 2 * w), channel(line.channel), inside(mask(0, line.length - 2 * w)) {}
        __m256 operator()(int64_t j) const {
            return _mm256_castsi256_ps(_mm256_maskz_loadu_epi16(inside, at + j * channel));
        }
    };
};

// The numbers w - left and w - left + stride of a line of `length`; 0 outside of it.
struct PairsAcross {
    const Brain* at;
    int64_t channel, position, length, left, stride;

    Brain one(int64_t j, int64_t i) const {
        return i >= 0 && i < length ? at[j * channel + i * position] : Brain{0};
    }
    float word(int64_t j, int64_t w) const { return pair(one(j, w - left), one(j, w - left + stride)); }
    void words(int64_t w, int64_t columns, float* to) const {
        const int64_t i = w - left;
        const Brain* first = i >= 0 && i < length ? at + i * position : nullptr;
        pairs(first, i + stride >= 0 && i + stride < length ? at + (i + stride) * position : nullptr, columns, to);
    }

    static constexpr bool kBeyond = true;
    struct Eight {
        const Brain* at;
        int64_t channel, stride;
        __mmask8 first, second;
        Eight(const PairsAcross& line, int64_t w)
            : at(line.at + w - line.left), channel(line.channel), stride(line.stride), first(inside(line, w)),
              second(inside(line, w + stride)) {}
        static __mmask8 inside(const PairsAcross& line, int64_t w) {
            return static_cast<__mmask8>(mask(line.left - w, line.left - w + line.length));
        }
        __m256 operator()(int64_t j) const {
            const Brain* from = at + j * channel;
            const __m256i low = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(first, from));
            const __m256i high = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(second, from + stride));
            return _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
        }
    };
};
#endif

// to[w * block + j] = line.word(j, w), for w < width and j < columns (0 from there to `block`).
template <class Line>
inline void gather(const Line& line, int64_t width, int64_t columns, int64_t block, float* to) {
    int64_t w = 0;
#ifdef __AVX2__
    if (line.position == 1) {
        for (; w + (Line::kBeyond ? 1 : 8) <= width; w += 8) {
            const typename Line::Eight words(line, w);
            const int64_t here = width - w < 8 ? width - w : 8;
            for (int64_t first = (block - 1) / 8 * 8; first >= 0; first -= 8) {
                const int64_t count = columns - first < 8 ? columns - first : 8;
                const int64_t room = block - first < 8 ? block - first : 8;
                __m256 v[8];
                for (int64_t j = 0; j < 8; ++j) v[j] = j < count ? words(first + j) : _mm256_setzero_ps();
                transpose(v);
                // A store of eight may reach into the next position, whose first channels are written after it (so the
                // last channels come first), but not beyond the last of these positions.
                for (int64_t i = 0; i < here; ++i) {
                    if (i * block + first + 8 <= here * block) {
                        _mm256_storeu_ps(to + i * block + first, v[i]);
                    } else {
                        float last[8];
                        _mm256_storeu_ps(last, v[i]);
                        std::memcpy(to + i * block + first, last, sizeof(float) * room);
                    }
                }
            }
            to += here * block;
        }
    }
#endif
    for (; w < width; ++w, to += block) {
        if (line.channel == 1) {
            line.words(w, columns, to);
        } else {
            for (int64_t j = 0; j < columns; ++j) to[j] = line.word(j, w);
        }
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

// The words of a line of y.
template <class T>
inline void pack_line(const T* y, int64_t channel, int64_t position, int64_t width, int64_t size, int, float* out) {
    gather(Numbers<T>{y, channel, position}, width, size, size, out);
}

#ifdef __AVX512BF16__
inline void pack_line(const Brain* y, int64_t channel, int64_t position, int64_t width, int64_t size, int word,
                      float* out) {
    if (word == 2) return gather(PairsAlong{y, channel, position, width}, ceil_div(width, 2), size, size, out);
    gather(Numbers<Brain>{y, channel, position}, width, size, size, out);
}
#endif

// y of some rows and one group: for each run and piece of output channels [rows * words][piece].
template <class T>
void pack_y(const Conv& c, const Cut& cut, const T* y, int64_t rows, float* out) {
    const int64_t* step = c.y_stride;  // row, channel, and the three dimensions
    ask_for(y + rows * step[0], sizeof(T) * rows * step[0]);
    // Whether lines that follow each other in memory make a longer one.
    const bool together = c.out[0] == 1 && step[3] == c.out[2] * step[4] && c.out[2] % cut.word == 0;
    for_runs(c, rows, [&](const Run& run) {
        const int64_t joined = together ? run.lines : 1;
        for (int64_t piece = 0; piece < cut.pieces; ++piece) {
            const int64_t size = cut.size(piece);
            for (int64_t row = 0; row < rows; ++row) {
                const T* from = y + row * step[0] + cut.first(piece) * step[1] + run.w * step[4];
                int64_t d = run.d, h = run.h;
                for (int64_t line = 0; line < run.lines; line += joined) {
                    const int64_t width = joined * run.width;
                    pack_line(from + d * step[2] + h * step[3], step[1], step[4], width, size, cut.word, out);
                    out += ceil_div(width, cut.word) * size;
                    if (++h == c.out[1]) h = 0, ++d;
                }
            }
        }
    });
}

// A line of the padded copy of x, [pad2][block]: `width` positions of the image after the left padding.
template <class T>
inline void pad_line(const Conv& c, const Cut& cut, const T* x, int64_t left, int64_t width, int64_t columns, float* out) {
    std::memset(out, 0, sizeof(float) * left * cut.block);
    gather(Numbers<T>{x, c.x_stride[1], c.x_stride[4]}, width, columns, cut.block, out + left * cut.block);
    std::memset(out + (left + width) * cut.block, 0, sizeof(float) * (cut.pad[2] - left - width) * cut.block);
}

#ifdef __AVX512BF16__
inline void pad_line(const Conv& c, const Cut& cut, const Brain* x, int64_t left, int64_t width, int64_t columns,
                     float* out) {
    const int64_t channel = c.x_stride[1], position = c.x_stride[4];
    if (cut.word != 2) {
        pad_line<Brain>(c, cut, x, left, width, columns, out);
    } else if (cut.apart) {
        gather(PairsAlong{x, channel, position, width}, cut.pad[2], columns, cut.block, out);
    } else {
        gather(PairsAcross{x, channel, position, width, left, c.stride[2]}, cut.pad[2], columns, cut.block, out);
    }
}
#endif

// A block of columns of one row and group of x: [pad0][pad1][pad2][block], zeros outside of the image.
template <class T>
void pack_x(const Conv& c, const Cut& cut, const T* x, int64_t first, float* out) {
    const int64_t* step = c.x_stride;
    const int64_t columns = cut.columns - first < cut.block ? cut.columns - first : cut.block;
    const int64_t left = c.pad[2], end = cut.pad[2] * (cut.apart ? cut.word : 1);
    const int64_t right = left + c.in[2] < end ? left + c.in[2] : end;
    for (int64_t d = 0; d < cut.pad[0]; ++d) {
        for (int64_t h = 0; h < cut.pad[1]; ++h) {
            const int64_t from_d = d - c.pad[0], from_h = h - c.pad[1];
            const int64_t line = cut.pad[2] * cut.block;
            if (from_d < 0 || from_d >= c.in[0] || from_h < 0 || from_h >= c.in[1] || right <= left) {
                std::memset(out, 0, sizeof(float) * line);
            } else {
                const T* at = x + first * step[1] + from_d * step[2] + from_h * step[3];
                pad_line(c, cut, at, left, right - left, columns, out);
            }
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
            source.row_step = cut.x_words / cut.chunk;
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
        if (!cut.apart) source.step[2] *= cut.word;
        const float* ys = y + (row * c.groups + task.group * rows) * c.p * cut.words;
        for_runs(c, rows, [&](const Run& run) {
            for (int64_t piece = task.from; piece < task.to; ++piece) {
                const int64_t p = cut.first(piece), size = cut.size(piece);
                const Tile tile = tile_of(size, cut.vectors, cut.word);
                const float* at = ys + p * run.words(cut.word);
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
            ys += c.p * run.words(cut.word);
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

// Lines that follow each other in memory are one longer line, where every position has the input of the same place.
Conv flat(Conv c) {
    for (int i = 0; i < 3; ++i) {
        if (c.kernel[i] != 1 || c.stride[i] != 1 || c.pad[i] != 0 || c.in[i] != c.out[i]) return c;
    }
    for (int i = 1; i >= 0; --i) {
        const bool follows = c.x_stride[2 + i] == c.in[2] * c.x_stride[4] && c.y_stride[2 + i] == c.in[2] * c.y_stride[4];
        if (c.in[i] != 1 && !follows) return c;
        c.in[2] = c.out[2] = c.in[2] * c.in[i];
        c.in[i] = c.out[i] = 1;
    }
    return c;
}

template <class T>
void run(const Conv& given, const T* x, const T* y, const float* weights, float* out, double* sq, double* scratch,
         int threads) {
    const bool sum = weights != nullptr;
    const Conv c = flat(given);
    const Cut cut(c, threads, sum);
    const int64_t size = cut.taps * c.groups * c.p * cut.columns;
    double* square_parts = scratch;
    float* own = aligned(square_parts + cut.squares);
    float* partial = own + threads * (cut.x_words + cut.acc_numbers);
    float* packed = partial + cut.sum_numbers;
    float* sums = cut.parts > 1 ? partial : out;
    const int64_t owners = sum ? cut.parts : cut.wave;  // a wave's examples, or parts of the sum
    const int64_t chunks = ceil_div(c.rows, cut.chunk);
    const int64_t tasks = owners * c.groups * cut.blocks * cut.splits;
    if (sum) std::memset(sums, 0, sizeof(float) * cut.parts * size);
    if (!c.examples) return;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* mine = own + thread_number() * (cut.x_words + cut.acc_numbers);
        float* acc = mine + cut.x_words;
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
                       packed + e * cut.y_words + (row * c.groups + group * rows) * c.p * cut.words);
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
                    example(c, cut, task, x + (begin + e) * c.rows * c.x_stride[0], packed + e * cut.y_words, mine, acc);
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
    const Cut cut(flat(c), threads, sum);
    const int64_t floats = cut.wave * cut.y_words + cut.sum_numbers + threads * (cut.x_words + cut.acc_numbers);
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
