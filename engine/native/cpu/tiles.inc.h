// Walks a ternary product in tiles of kRows rows and kTokens tokens. Included by each path after it has defined
// `tile<kRows, kTokens>`; like lanes.inc.h it has internal linkage.

namespace {

template <int kRows, int kTokens>
void ternary(const uint8_t *codes, int row_bytes, int rows, const int8_t *x, size_t x_stride, int tokens,
             int32_t *sums, size_t sums_stride) {
  int t = 0;
  for (; t < tokens; t += tokens - t >= kTokens ? kTokens : 1) {
    const int8_t *xt = x + t * x_stride;
    int32_t *out = sums + t * sums_stride;
    bool many = tokens - t >= kTokens;
    int r = 0;
    for (; r + kRows <= rows; r += kRows) {
      const uint8_t *block = codes + (size_t)r * row_bytes;
      if (many) {
        tile<kRows, kTokens>(block, row_bytes, xt, x_stride, out + r, sums_stride);
      } else {
        tile<kRows, 1>(block, row_bytes, xt, x_stride, out + r, sums_stride);
      }
    }
    for (; r < rows; ++r) {
      const uint8_t *row = codes + (size_t)r * row_bytes;
      if (many) {
        tile<1, kTokens>(row, row_bytes, xt, x_stride, out + r, sums_stride);
      } else {
        tile<1, 1>(row, row_bytes, xt, x_stride, out + r, sums_stride);
      }
    }
  }
}

}  // namespace
