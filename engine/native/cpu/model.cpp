// Maps a prepared file and believes nothing it says: sizes, offsets, alignment, names, checksums of header and
// directory. (The tensors' own hashes are for `verify_prepared`; no value in them can lead out of bounds.)
// The layout is told in engine/formats/prepared.py.
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "failure.h"

namespace halo {
namespace {

const size_t kPage = 4096, kEntryBytes = 128, kHeaderBytes = 80;
const uint32_t kVersion = 1, kF32 = 1, kBf16 = 2, kTernary = 3;

struct Header {
  char magic[8];
  uint32_t version, count;
  uint64_t file_bytes, directory_offset;
  uint32_t directory_crc, reserved;
  halo_config config;
  uint32_t header_crc;
};
static_assert(offsetof(Header, header_crc) == kHeaderBytes, "the header has no padding");

uint32_t crc32(const uint8_t *data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1)));
  }
  return ~crc;
}

void check_range(const char *path, const char *name, int value, int most) {
  if (value < 1 || value > most)
    throw Failure(HALO_FORMAT, "%s says %s = %d; 1 to %d is possible", path, name, value, most);
}

// The same limits as engine/model.py: with them, no size below can overflow 64 bits.
void check_config(const char *path, const halo_config &c) {
  check_range(path, "hidden_size", c.hidden_size, 65536);
  check_range(path, "intermediate_size", c.intermediate_size, 262144);
  check_range(path, "num_layers", c.num_layers, 4096);
  check_range(path, "num_heads", c.num_heads, 65536);
  check_range(path, "num_kv_heads", c.num_kv_heads, 65536);
  check_range(path, "vocab_size", c.vocab_size, 1 << 24);
  check_range(path, "max_seq_len", c.max_seq_len, 1 << 20);
  if (c.hidden_size % c.num_heads || c.hidden_size / c.num_heads % 2 || c.num_heads % c.num_kv_heads)
    throw Failure(HALO_FORMAT, "%s says %d heads and %d KV heads for a hidden size of %d, which does not divide", path,
                  c.num_heads, c.num_kv_heads, c.hidden_size);
  bool sane = isfinite(c.rope_theta) && c.rope_theta > 0 && isfinite(c.rms_norm_eps) && c.rms_norm_eps > 0;
  if (!sane || c.tie_embeddings != 1) throw Failure(HALO_FORMAT, "%s has impossible constants in its header", path);
}

}  // namespace

struct Model::Entry {
  char name[48];
  uint32_t dtype, rows, cols, row_bytes;
  uint64_t offset, bytes;
  uint8_t sha256[32], reserved[16];
};

Model::Model(const char *path) : path_(path) {
  static_assert(sizeof(Entry) == kEntryBytes, "an entry has no padding");
  map(path);
  try {
    read_header();
    read_tensors();
  } catch (...) {
    munmap((void *)data_, size_);
    throw;
  }
}

Model::~Model() { munmap((void *)data_, size_); }

void Model::map(const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Failure(HALO_IO, "%s cannot be opened: %s", path, strerror(errno));
  struct stat info;
  bool plain = fstat(file, &info) == 0 && S_ISREG(info.st_mode);
  if (!plain || (size_t)info.st_size < 2 * kPage) {
    close(file);
    throw Failure(HALO_FORMAT, "%s is no prepared model: it is %s", path, plain ? "too short" : "not a plain file");
  }
  size_ = (size_t)info.st_size;
  void *mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  int error = errno;
  close(file);
  if (mapped == MAP_FAILED) throw Failure(HALO_IO, "%s cannot be mapped: %s", path, strerror(error));
  data_ = (const uint8_t *)mapped;
}

void Model::read_header() {
  const char *path = path_.c_str();
  Header header;
  memcpy(&header, data_, sizeof header);
  if (memcmp(header.magic, "HALOPREP", 8)) throw Failure(HALO_FORMAT, "%s is no prepared model", path);
  if (header.version != kVersion)
    throw Failure(HALO_FORMAT, "%s is a prepared model of version %u, and this library reads %u", path, header.version,
                  kVersion);
  if (crc32(data_, kHeaderBytes) != header.header_crc) throw Failure(HALO_FORMAT, "the header of %s is damaged", path);
  if (header.file_bytes != size_)
    throw Failure(HALO_FORMAT, "%s has %zu bytes, and its header says %llu", path, size_,
                  (unsigned long long)header.file_bytes);
  check_config(path, header.config);
  config = header.config;
  count_ = header.count;
  if (count_ != 4u + 18u * (uint32_t)config.num_layers)
    throw Failure(HALO_FORMAT, "%s has %u tensors, not what its shape asks for", path, count_);
  size_t directory = count_ * kEntryBytes;
  if (header.directory_offset != kPage || directory > size_ - kPage)
    throw Failure(HALO_FORMAT, "the directory of %s lies outside of the file", path);
  if (crc32(data_ + kPage, directory) != header.directory_crc)
    throw Failure(HALO_FORMAT, "the directory of %s is damaged", path);
}

// The next tensor of the directory, which must be exactly this one.
const uint8_t *Model::tensor(const char *name, uint32_t dtype, int rows, int cols, size_t row_bytes) {
  Entry entry;
  memcpy(&entry, data_ + kPage + kEntryBytes * next_++, sizeof entry);
  bool same = strncmp(entry.name, name, sizeof entry.name) == 0 && entry.dtype == dtype &&
              entry.rows == (uint32_t)rows && entry.cols == (uint32_t)cols && entry.row_bytes == row_bytes &&
              entry.bytes == (uint64_t)rows * row_bytes;
  if (!same) throw Failure(HALO_FORMAT, "the tensor %s of %s has not the shape it should have", name, path_.c_str());
  size_t data_start = kPage + count_ * kEntryBytes;
  bool inside = entry.offset % kPage == 0 && entry.offset >= data_start && entry.offset <= size_ &&
                entry.bytes <= size_ - entry.offset;
  if (!inside) throw Failure(HALO_FORMAT, "the tensor %s lies outside of %s", name, path_.c_str());
  return data_ + entry.offset;
}

const float *Model::floats(const char *name, int rows, int cols) {
  return (const float *)tensor(name, kF32, rows, cols, 4 * (size_t)round_up(cols, 16));
}

Ternary Model::ternary(const char *name, int rows, int cols) {
  int row_bytes = round_up(cols, 64) / 4;
  const uint8_t *codes = tensor(name, kTernary, rows, cols, (size_t)row_bytes);
  std::string scales = std::string(name) + ".scales";
  return {codes, floats(scales.c_str(), 1, rows), rows, cols, row_bytes};
}

void Model::read_tensors() {
  const halo_config &c = config;
  int hidden = c.hidden_size, inter = c.intermediate_size, kv = c.num_kv_heads * head_dim();
  uint32_t embedding_dtype;
  memcpy(&embedding_dtype, data_ + kPage + offsetof(Entry, dtype), 4);
  embedding_bf16 = embedding_dtype == kBf16;
  embedding_row_bytes = (size_t)round_up(hidden, 16) * (embedding_bf16 ? 2 : 4);
  embedding = tensor("embedding", embedding_bf16 ? kBf16 : kF32, c.vocab_size, hidden, embedding_row_bytes);
  final_norm = floats("final_norm", 1, hidden);
  rope_row = round_up(head_dim() / 2, 16);
  rope_cos = floats("rope_cos", c.max_seq_len, head_dim() / 2);
  rope_sin = floats("rope_sin", c.max_seq_len, head_dim() / 2);
  for (int index = 0; index < c.num_layers; ++index) {
    std::string prefix = "layers." + std::to_string(index) + ".";
    auto norm = [&](const char *name, int n) { return floats((prefix + name).c_str(), 1, n); };
    auto matrix = [&](const char *name, int rows, int cols) { return ternary((prefix + name).c_str(), rows, cols); };
    Layer layer;
    layer.input_norm = norm("input_norm", hidden);
    layer.post_attn_norm = norm("post_attn_norm", hidden);
    layer.attn_sub_norm = norm("attn_sub_norm", hidden);
    layer.ffn_sub_norm = norm("ffn_sub_norm", inter);
    layer.q = matrix("q", hidden, hidden);
    layer.k = matrix("k", kv, hidden);
    layer.v = matrix("v", kv, hidden);
    layer.o = matrix("o", hidden, hidden);
    layer.gate = matrix("gate", inter, hidden);
    layer.up = matrix("up", inter, hidden);
    layer.down = matrix("down", hidden, inter);
    layers.push_back(layer);
  }
}

}  // namespace halo
