// Chooses the tile for a number of tokens, and walks the blocks of a ternary product. Included by each path after it
// has defined `ternary_one`, `tile<kBlocks, kTokens>`, `coarse_tile<kVectors>` and kPair; like lanes.inc.h it has internal
// linkage.

namespace {

template <int kTokens>
void ternary_tokens(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int32_t *sums) {
  size_t block_bytes = (size_t)chunks * halo::kTernaryChunk;
  int block = 0;
  for (; block + kPair <= blocks; block += kPair, codes += kPair * block_bytes, sums += kPair * kTokens * 16)
    tile<kPair, kTokens>(codes, chunks, x, sums);
  for (; block < blocks; ++block, codes += block_bytes, sums += kTokens * 16) tile<1, kTokens>(codes, chunks, x, sums);
}

void ternary(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int tokens, int32_t *sums) {
  static constexpr decltype(&ternary_one) kByTokens[] = {
      ternary_one,       ternary_tokens<2>, ternary_tokens<3>, ternary_tokens<4>,  ternary_tokens<5>,  ternary_tokens<6>,
      ternary_tokens<7>, ternary_tokens<8>, ternary_tokens<9>, ternary_tokens<10>, ternary_tokens<11>, ternary_tokens<12>};
  static_assert(sizeof kByTokens / sizeof *kByTokens == halo::kTileTokens, "one tile for each number of tokens");
  kByTokens[tokens - 1](codes, blocks, chunks, x, sums);
}

void coarse(const uint8_t *tiles, int chunks, const int32_t *x, int vectors, int32_t *sums) {
  static constexpr decltype(&coarse_tile<1>) kByVectors[] = {coarse_tile<1>, coarse_tile<2>, coarse_tile<3>,
                                                             coarse_tile<4>, coarse_tile<5>, coarse_tile<6>,
                                                             coarse_tile<7>, coarse_tile<8>};
  static_assert(sizeof kByVectors / sizeof *kByVectors == halo::kCoarseVectors, "one tile for each number of vectors");
  kByVectors[vectors - 1](tiles, chunks, x, sums);
}

}  // namespace
