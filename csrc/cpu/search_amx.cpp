// cosine_topk's products on AMX tiles: keys as they are stored are the first operand, panels the second. The
// loops are compiled twice, over the instructions and over a plain emulation of them for tests on other
// processors.
#include <string.h>

#include "search_kernels.h"

namespace clara_fast::cpu {
namespace {

constexpr int kTile = 16;       // rows of a tile
constexpr int kTileBytes = 64;  // of a row
constexpr int kTileGroups = kTileBytes / 4;

// The layout that ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileConfig() {
    for (int t = 0; t < 8; ++t) {
      row_bytes[t] = kTileBytes;
      rows[t] = kTile;
    }
  }
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kConfig;

// Written out, so that no compiler flag is needed and nothing else in this file may use these instructions.
struct Amx {
  Amx() { asm volatile("ldtilecfg %0" ::"m"(kConfig)); }
  ~Amx() { asm volatile("tilerelease"); }
  template <int kT>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kT));
  }
  template <int kT>
  void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kT), "r"(rows), "r"(stride) : "memory");
  }
  template <int kT>
  void store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kT), "r"(rows), "r"(stride) : "memory");
  }
  template <int kC, int kA, int kB>
  void multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  void multiply_digits() {  // signed with unsigned
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};

struct EmulatedAmx {
  uint8_t tiles[8][kTile][kTileBytes];

  template <int kT>
  void zero() {
    memset(tiles[kT], 0, sizeof(tiles[kT]));
  }
  template <int kT>
  void load(const void* rows, int64_t stride) {
    for (int m = 0; m < kTile; ++m)
      memcpy(tiles[kT][m], static_cast<const char*>(rows) + m * stride, kTileBytes);
  }
  template <int kT>
  void store(void* rows, int64_t stride) {
    for (int m = 0; m < kTile; ++m) memcpy(static_cast<char*>(rows) + m * stride, tiles[kT][m], kTileBytes);
  }
  template <class T>
  static T read(const uint8_t* from, int at) {
    T value;
    memcpy(&value, from + at * int{sizeof(T)}, sizeof(T));
    return value;
  }
  static float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }
  // tiles[kC][m][n] += the products of every group of row m of A with lane n of that group of B.
  template <int kC, int kA, int kB, class Sum, class Dot>
  void multiply(Dot dot) {
    for (int m = 0; m < kTile; ++m) {
      for (int n = 0; n < kTileGroups; ++n) {
        const Sum sum = read<Sum>(tiles[kC][m], n) + dot(tiles[kA][m], n);
        memcpy(tiles[kC][m] + 4 * n, &sum, sizeof(sum));
      }
    }
  }
  template <int kC, int kA, int kB>
  void multiply_pairs() {
    multiply<kC, kA, kB, float>([this](const uint8_t* a, int n) {
      float sums[2] = {};  // of the even and of the odd columns, as the instruction adds them
      for (int g = 0; g < kTileGroups; ++g) {
        for (int i = 0; i < 2; ++i) {
          sums[i] += widen(read<uint16_t>(a, 2 * g + i)) * widen(read<uint16_t>(tiles[kB][g], 2 * n + i));
        }
      }
      return sums[0] + sums[1];
    });
  }
  template <int kC, int kA, int kB>
  void multiply_digits() {
    multiply<kC, kA, kB, int32_t>([this](const uint8_t* a, int n) {
      int32_t sum = 0;
      for (int g = 0; g < kTileGroups; ++g) {
        for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a[4 * g + i]) * tiles[kB][g][4 * n + i];
      }
      return sum;
    });
  }
};

struct PairProduct {
  template <int kC, int kA, int kB, class Tiles>
  static void multiply(Tiles& tiles) {
    tiles.template multiply_pairs<kC, kA, kB>();
  }
};
struct DigitProduct {
  template <int kC, int kA, int kB, class Tiles>
  static void multiply(Tiles& tiles) {
    tiles.template multiply_digits<kC, kA, kB>();
  }
};

// kKeyTiles x kPanels tiles of sums: tile 2 * k + p of keys k and panel p, keys in tiles 4 and 5, panels in 6
// and 7.
template <class Product, int kKeyTiles, int kPanels, class Tiles>
void part(Tiles& tiles, const char* keys, int64_t stride, const char* panels, int64_t panel_stride,
          int64_t groups, char* sums, bool first) {
  constexpr bool kTwoKeys = kKeyTiles == 2;
  constexpr bool kTwoPanels = kPanels == 2;
  constexpr int64_t kSumsRow = kLanes * 4;
  constexpr int64_t kNextKeys = kTile * kSumsRow;
  constexpr int64_t kNextPanel = kKeyBlock * kSumsRow;
  if (first) {
    tiles.template zero<0>();
    if constexpr (kTwoPanels) tiles.template zero<1>();
    if constexpr (kTwoKeys) tiles.template zero<2>();
    if constexpr (kTwoKeys && kTwoPanels) tiles.template zero<3>();
  } else {
    tiles.template load<0>(sums, kSumsRow);
    if constexpr (kTwoPanels) tiles.template load<1>(sums + kNextPanel, kSumsRow);
    if constexpr (kTwoKeys) tiles.template load<2>(sums + kNextKeys, kSumsRow);
    if constexpr (kTwoKeys && kTwoPanels) tiles.template load<3>(sums + kNextPanel + kNextKeys, kSumsRow);
  }
  for (int64_t g = 0; g < groups; g += kTileGroups) {
    tiles.template load<4>(keys + g * 4, stride);
    tiles.template load<6>(panels + g * kTileBytes, kTileBytes);
    Product::template multiply<0, 4, 6>(tiles);
    if constexpr (kTwoPanels) {
      tiles.template load<7>(panels + panel_stride + g * kTileBytes, kTileBytes);
      Product::template multiply<1, 4, 7>(tiles);
    }
    if constexpr (kTwoKeys) {
      tiles.template load<5>(keys + kTile * stride + g * 4, stride);
      Product::template multiply<2, 5, 6>(tiles);
      if constexpr (kTwoPanels) Product::template multiply<3, 5, 7>(tiles);
    }
  }
  tiles.template store<0>(sums, kSumsRow);
  if constexpr (kTwoPanels) tiles.template store<1>(sums + kNextPanel, kSumsRow);
  if constexpr (kTwoKeys) tiles.template store<2>(sums + kNextKeys, kSumsRow);
  if constexpr (kTwoKeys && kTwoPanels) tiles.template store<3>(sums + kNextPanel + kNextKeys, kSumsRow);
}

template <class Tiles, class Product>
void tile(const void* keys, int64_t stride, const void* panels, int64_t panel_stride, int64_t num_panels,
          int64_t groups, void* sums, bool first) {
  static_assert(kKeyBlock == 3 * kTile && kLanes == kTile);
  Tiles tiles;  // configures this thread's tiles until it goes
  const char* key = static_cast<const char*>(keys);
  const char* last_keys = key + 2 * kTile * stride;
  for (int64_t p = 0; p < num_panels; p += 2) {
    const char* panel = static_cast<const char*>(panels) + p * panel_stride;
    char* sum = static_cast<char*>(sums) + p * kKeyBlock * kLanes * 4;
    char* last_sums = sum + 2 * kTile * kLanes * 4;
    if (p + 1 < num_panels) {
      part<Product, 2, 2>(tiles, key, stride, panel, panel_stride, groups, sum, first);
      part<Product, 1, 2>(tiles, last_keys, stride, panel, panel_stride, groups, last_sums, first);
    } else {
      part<Product, 2, 1>(tiles, key, stride, panel, panel_stride, groups, sum, first);
      part<Product, 1, 1>(tiles, last_keys, stride, panel, panel_stride, groups, last_sums, first);
    }
  }
}

template <class Tiles>
void add(SearchKernels& search) {
  add_avx512_bf16(search);
  search.tile[static_cast<int>(Format::kPairs)] = &tile<Tiles, PairProduct>;
  search.tile[static_cast<int>(Format::kDigits)] = &tile<Tiles, DigitProduct>;
  search.prefers_terms = true;
}

}  // namespace

void add_amx(SearchKernels& search) { add<Amx>(search); }
void add_emulated_amx(SearchKernels& search) { add<EmulatedAmx>(search); }

}  // namespace clara_fast::cpu
