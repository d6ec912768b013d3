// The float kernels, written once on 16 virtual lanes and included by each path after it has defined `V` and its
// operations. Not a header of its own: everything here has internal linkage, because code compiled with one path's
// instructions must never be the copy that the linker keeps for another path.
//
// A path defines: V, vzero, vset1, vload, vstore, vload_bf16, vadd, vsub, vmul, vdiv, vmax, vfma(a, b, c) = a * b + c,
// vfrom_ints(p) of 16 int32, vsum (the tree), vscale2(p, t) = p * 2^n where t = n + 1.5 * 2^23, vmaxabs_bits(x, n),
// vquantize16(x, s, q).

namespace {

float inverse_rms(const float *x, int n, float eps) {
  V sum = vzero();
  for (int i = 0; i < n; i += 16) {
    V v = vload(x + i);
    sum = vfma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(vsum(sum) / (float)n + eps);
}

void rmsnorm(const float *x, const float *weight, int n, float eps, float *y) {
  V r = vset1(inverse_rms(x, n, eps));
  for (int i = 0; i < n; i += 16) vstore(y + i, vmul(vmul(vload(x + i), r), vload(weight + i)));
}

bool quantize(const float *x, int n, int8_t *q, float *scale) {
  uint32_t bits = vmaxabs_bits(x, n);
  if (bits >= 0x7f800000u) return false;
  float most;
  __builtin_memcpy(&most, &bits, 4);
  *scale = 127.0f / (most > 1e-5f ? most : 1e-5f);
  V s = vset1(*scale);
  for (int i = 0; i < n; i += 16) vquantize16(vload(x + i), s, q + i);
  return true;
}

void relu2(const float *gate, const float *up, int n, float *y) {
  for (int i = 0; i < n; i += 16) {
    V g = vmax(vload(gate + i), vzero());
    vstore(y + i, vmul(vmul(g, g), vload(up + i)));
  }
}

template <bool kBf16>
inline V load_row(const uint8_t *row, int i) {
  return kBf16 ? vload_bf16((const uint16_t *)row + i) : vload((const float *)row + i);
}

template <bool kBf16, int kRows>
inline void dot_tile(const uint8_t *rows, size_t row_bytes, const float *x, int n, float *out) {
  V sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = vzero();
  for (int i = 0; i < n; i += 16) {
    V v = vload(x + i);
    for (int r = 0; r < kRows; ++r) sum[r] = vfma(load_row<kBf16>(rows + r * row_bytes, i), v, sum[r]);
  }
  for (int r = 0; r < kRows; ++r) out[r] = vsum(sum[r]);
}

template <bool kBf16>
void dot_rows_of(const uint8_t *rows, size_t row_bytes, int count, const float *x, int n, float *out) {
  int r = 0;
  for (; r + 4 <= count; r += 4) dot_tile<kBf16, 4>(rows + r * row_bytes, row_bytes, x, n, out + r);
  for (; r < count; ++r) dot_tile<kBf16, 1>(rows + r * row_bytes, row_bytes, x, n, out + r);
}

void dot_rows(const uint8_t *rows, size_t row_bytes, bool bf16, int count, const float *x, int n, float *out) {
  if (bf16) {
    dot_rows_of<true>(rows, row_bytes, count, x, n, out);
  } else {
    dot_rows_of<false>(rows, row_bytes, count, x, n, out);
  }
}

// e^x for x <= 0, after Cephes' expf: x = n ln 2 + r, a polynomial in r, times 2^n. Below -86 it stays at e^-86, so
// that 2^n never leaves the normal range; what it adds to a softmax is below the last bit either way.
inline V vexp(V x) {
  x = vmax(x, vset1(-86.0f));
  const V magic = vset1(12582912.0f);
  V t = vfma(x, vset1(1.44269504f), magic);
  V n = vsub(t, magic);
  V r = vfma(n, vset1(-0.693359375f), x);
  r = vfma(n, vset1(2.12194440e-4f), r);
  V p = vset1(1.9875691500e-4f);
  p = vfma(p, r, vset1(1.3981999507e-3f));
  p = vfma(p, r, vset1(8.3334519073e-3f));
  p = vfma(p, r, vset1(4.1665795894e-2f));
  p = vfma(p, r, vset1(1.6666665459e-1f));
  p = vfma(p, r, vset1(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), r);
  return vscale2(vadd(p, vset1(1.0f)), t);
}

void silu(const float *gate, const float *up, int n, float *y) {
  for (int i = 0; i < n; i += 16) {
    V x = vload(gate + i), positive = vmax(x, vzero()), negative = vsub(x, positive);
    V e = vexp(vsub(negative, positive));
    V turned = vdiv(vadd(positive, vmul(negative, e)), vadd(vset1(1.0f), e));
    vstore(y + i, vmul(turned, vload(up + i)));
  }
}

void finish(const int32_t *sums, int tokens, int rows, const float *weight_scale, const int32_t *offset,
            const float *x_scale, float *out, size_t stride, bool add) {
  V scale = vload(weight_scale);
  for (int t = 0; t < tokens; ++t, sums += 16, out += stride) {
    int32_t centred[16];
    for (int r = 0; r < 16; ++r) centred[r] = sums[r] - offset[t];
    V y = vdiv(vmul(vfrom_ints(centred), scale), vset1(x_scale[t]));
    if (rows == 16) {
      vstore(out, add ? vadd(vload(out), y) : y);
      continue;
    }
    float some[16];
    vstore(some, y);
    for (int r = 0; r < rows; ++r) out[r] = add ? out[r] + some[r] : some[r];
  }
}

// The integers are exact: 2 u - 63 is twice a level. What the floats round is far below the bound's own slack.
void coarse_bounds(const int32_t *high_sums, const int32_t *low_sums, int rows, int first_row, const float *scale,
                   const float *error, const float *norm, const halo::CoarseToken &token, float *upper,
                   halo::CoarseBest *best) {
  int32_t high[16], low[16];
  for (int r = 0; r < 16; ++r) {
    high[r] = 2 * high_sums[r] - 63 * token.high_sum;
    low[r] = 2 * low_sums[r] - 63 * token.low_sum;
  }
  V whole = vfma(vfrom_ints(high), vset1(256.0f), vfrom_ints(low));
  V seen = vmul(vmul(whole, vset1(token.half_step)), vload(scale));
  V bound = vfma(vset1(token.by_error), vload(error), vmul(vset1(token.by_norm), vload(norm)));
  bound = vadd(bound, vset1(1.2e-38f));  // what is lost below the normal numbers
  float see[16], certain[16], above[16];
  vstore(see, seen);
  vstore(certain, vsub(seen, bound));
  vstore(above, vadd(seen, bound));
  for (int r = 0; r < rows; ++r) {
    upper[r] = above[r];
    if (certain[r] > best->certain) best->certain = certain[r];
    if (see[r] > best->seen) best->seen = see[r], best->row = first_row + r;
  }
}

}  // namespace
