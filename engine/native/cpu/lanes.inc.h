// The float kernels, written once on 16 virtual lanes and included by each path after it has defined `V` and its
// operations. Not a header of its own: everything here has internal linkage, because code compiled with one path's
// instructions must never be the copy that the linker keeps for another path.
//
// A path defines: V, vzero, vset1, vload, vstore, vload_bf16, vadd, vsub, vmul, vdiv, vmax, vfma(a, b, c) = a * b + c,
// vsum (the tree), vscale2(p, t) = p * 2^n where t = n + 1.5 * 2^23, vmaxabs_bits(x, n), vquantize16(x, s, q).

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

}  // namespace
