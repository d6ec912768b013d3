// Loads a prepared file and believes nothing it says: sizes, offsets, alignment, names, the checksums of header,
// directory and tensors. The layout is told in engine/formats/prepared.py. What every token reads is copied into huge
// pages, which the CPU reads up to twice as fast as the 4 KiB pages of a mapped file; the rows of full precision stay
// mapped.
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>

#include "checksum.h"
#include "failure.h"
#include "kernels.h"

namespace halo {
namespace {

const size_t kPage = 4096, kPiece = 1 << 20, kEntryBytes = 128, kHeaderBytes = 92;
const uint32_t kVersion = 2, kF32 = 1, kBf16 = 2, kTernary = 3, kCoarse = 4;
const int kMostLoaders = 8;  // threads that read a file

struct Header {
  char magic[8];
  uint32_t version, count;
  uint64_t file_bytes, directory_offset;
  uint32_t directory_crc, reserved;
  halo_config config;
  uint32_t header_crc;
};
static_assert(offsetof(Header, header_crc) == kHeaderBytes, "the header has no padding");

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
  check_range(path, "head_dim", c.head_dim, 1024);
  if (c.head_dim % 2 || c.num_heads % c.num_kv_heads)
    throw Failure(HALO_FORMAT, "%s says %d heads of %d over %d KV heads, which does not divide", path, c.num_heads,
                  c.head_dim, c.num_kv_heads);
  bool sane = isfinite(c.rope_theta) && c.rope_theta > 0 && isfinite(c.rms_norm_eps) && c.rms_norm_eps > 0;
  bool flags = (c.tie_embeddings | 1) == 1 && (c.activation | 1) == 1 && (c.sub_norms | 1) == 1;
  if (!sane || !flags) throw Failure(HALO_FORMAT, "%s has impossible constants in its header", path);
}

}  // namespace

struct Model::Entry {
  char name[48];
  uint32_t dtype, rows, cols, row_bytes;
  uint64_t offset, bytes;
  uint8_t sha256[32];
  uint32_t check;
  uint8_t reserved[12];
};

Model::Model(const char *path, bool copy) : path_(path) {
  static_assert(sizeof(Entry) == kEntryBytes, "an entry has no padding");
  map(path);
  try {
    read_header();
    next_ = 0;
    read_directory();  // once to check it, before anything is believed
    load(copy);
    next_ = 0;
    layers.clear();
    read_directory();
    check_rope();
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
  uint32_t layer = 16u + (config.sub_norms ? 2u : 0u);
  if (count_ != 8u + !config.tie_embeddings + layer * (uint32_t)config.num_layers)
    throw Failure(HALO_FORMAT, "%s has %u tensors, not what its shape asks for", path, count_);
  size_t directory = count_ * kEntryBytes;
  if (header.directory_offset != kPage || directory > size_ - kPage)
    throw Failure(HALO_FORMAT, "the directory of %s lies outside of the file", path);
  if (crc32(data_ + kPage, directory) != header.directory_crc)
    throw Failure(HALO_FORMAT, "the directory of %s is damaged", path);
}

// The next tensor of the directory, which must be exactly this one.
const uint8_t *Model::tensor(const std::string &name, uint32_t dtype, int rows, int cols, uint32_t row_bytes,
                             size_t bytes) {
  Entry entry;
  memcpy(&entry, data_ + kPage + kEntryBytes * next_++, sizeof entry);
  bool same = strncmp(entry.name, name.c_str(), sizeof entry.name) == 0 && entry.dtype == dtype &&
              entry.rows == (uint32_t)rows && entry.cols == (uint32_t)cols && entry.row_bytes == row_bytes &&
              entry.bytes == bytes;
  if (!same)
    throw Failure(HALO_FORMAT, "the tensor %s of %s has not the shape it should have", name.c_str(), path_.c_str());
  size_t data_start = kPage + count_ * kEntryBytes;
  bool inside = entry.offset % kPage == 0 && entry.offset >= data_start && entry.offset <= size_ &&
                entry.bytes <= size_ - entry.offset;
  if (!inside) throw Failure(HALO_FORMAT, "the tensor %s lies outside of %s", name.c_str(), path_.c_str());
  bool hot = name != "embedding" && name != "head";
  if (hot) hot_ = std::max(hot_, (size_t)(entry.offset + entry.bytes));
  return (hot && copy_ ? copy_->get() : data_) + entry.offset;
}

const float *Model::floats(const std::string &name, int rows, int cols) {
  uint32_t row = 4 * (uint32_t)round_up(cols, 16);
  return (const float *)tensor(name, kF32, rows, cols, row, (size_t)row * rows);
}

Ternary Model::ternary(const std::string &name, int rows, int cols) {
  size_t chunks = (size_t)(round_up(rows, kRows) / kRows) * (round_up(cols, kTernaryCols) / kTernaryCols);
  const uint8_t *codes = tensor(name, kTernary, rows, cols, 0, chunks * kTernaryChunk);
  return {codes, floats(name + ".scales", 1, rows), rows, cols};
}

Rows Model::rows(const std::string &name) {
  uint32_t dtype;
  memcpy(&dtype, data_ + kPage + kEntryBytes * next_ + offsetof(Entry, dtype), 4);
  bool bf16 = dtype == kBf16;
  uint32_t row = (uint32_t)round_up(config.hidden_size, 16) * (bf16 ? 2 : 4);
  return {tensor(name, bf16 ? kBf16 : kF32, config.vocab_size, config.hidden_size, row, (size_t)row * config.vocab_size),
          row, bf16};
}

void Model::read_layer(const std::string &prefix) {
  int hidden = config.hidden_size, inter = config.intermediate_size, kv = config.num_kv_heads * head_dim();
  Layer layer = {};
  layer.input_norm = floats(prefix + "input_norm", 1, hidden);
  layer.post_attn_norm = floats(prefix + "post_attn_norm", 1, hidden);
  if (config.sub_norms) {
    layer.attn_sub_norm = floats(prefix + "attn_sub_norm", 1, q_size());
    layer.ffn_sub_norm = floats(prefix + "ffn_sub_norm", 1, inter);
  }
  layer.q = ternary(prefix + "q", q_size(), hidden);
  layer.k = ternary(prefix + "k", kv, hidden);
  layer.v = ternary(prefix + "v", kv, hidden);
  layer.o = ternary(prefix + "o", hidden, q_size());
  layer.gate = ternary(prefix + "gate", inter, hidden);
  layer.up = ternary(prefix + "up", inter, hidden);
  layer.down = ternary(prefix + "down", hidden, inter);
  layers.push_back(layer);
}

// No cosine is beyond 1. An infinity there makes a query that is no number, which is no int8 either.
void Model::check_rope() const {
  const size_t count = (size_t)config.max_seq_len * rope_row;
  for (const float *table : {rope_cos, rope_sin})
    for (size_t i = 0; i < count; ++i)
      if (!(fabsf(table[i]) <= 1.0f))
        throw Failure(HALO_FORMAT, "the tensor %s of %s has a number beyond 1", table == rope_cos ? "rope_cos" : "rope_sin",
                      path_.c_str());
}

void Model::read_directory() {
  const halo_config &c = config;
  final_norm = floats("final_norm", 1, c.hidden_size);
  rope_row = round_up(head_dim() / 2, 16);
  rope_cos = floats("rope_cos", c.max_seq_len, head_dim() / 2);
  rope_sin = floats("rope_sin", c.max_seq_len, head_dim() / 2);
  for (int index = 0; index < c.num_layers; ++index) read_layer("layers." + std::to_string(index) + ".");
  size_t chunks = (size_t)(round_up(c.vocab_size, kRows) / kRows) * (round_up(c.hidden_size, kCoarseCols) / kCoarseCols);
  coarse.tiles = tensor("coarse", kCoarse, c.vocab_size, c.hidden_size, 0, chunks * kCoarseChunk);
  coarse.scale = floats("coarse.scale", 1, c.vocab_size);
  coarse.error = floats("coarse.error", 1, c.vocab_size);
  coarse.norm = floats("coarse.norm", 1, c.vocab_size);
  embedding = rows("embedding");
  head = c.tie_embeddings ? embedding : rows("head");
}

// One MiB of a tensor, or what is left of it.
struct Model::Piece {
  uint32_t tensor;
  size_t offset, bytes;
};

// What lies between the tensors is zero: any other byte there is damage too.
void Model::check_padding(const std::vector<Entry> &entries) const {
  auto zero = [&](size_t from, size_t to) {
    for (size_t i = from; i < to; ++i)
      if (data_[i]) throw Failure(HALO_FORMAT, "byte %zu of %s is damaged", i, path_.c_str());
  };
  zero(kHeaderBytes + 4, kPage);
  size_t end = kPage + count_ * kEntryBytes;
  for (const Entry &entry : entries) {
    if (entry.offset < end) throw Failure(HALO_FORMAT, "the tensors of %s overlap", path_.c_str());
    if (entry.offset - end >= kPage) throw Failure(HALO_FORMAT, "there is a gap in %s", path_.c_str());
    zero(end, entry.offset);
    end = entry.offset + entry.bytes;
  }
  if (size_ - end >= kPage) throw Failure(HALO_FORMAT, "%s goes on after its last tensor", path_.c_str());
  zero(end, size_);
}

// Reads the file once: copies what is hot, and checks every tensor. Pieces are shared out among threads.
void Model::load(bool copy) {
  std::vector<Entry> entries(count_);
  memcpy(entries.data(), data_ + kPage, count_ * kEntryBytes);
  check_padding(entries);
  std::vector<Piece> pieces;
  for (uint32_t t = 0; t < count_; ++t)
    for (size_t done = 0; done < entries[t].bytes; done += kPiece)
      pieces.push_back({t, (size_t)entries[t].offset + done, std::min(kPiece, (size_t)entries[t].bytes - done)});
  if (copy) copy_ = std::make_unique<Buffer<uint8_t>>(hot_ + kPage, 1);
  std::vector<uint32_t> checks(pieces.size());
  int file = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Failure(HALO_IO, "%s cannot be opened: %s", path_.c_str(), strerror(errno));
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  auto work = [&] {
    std::vector<uint8_t> own;
    try {
      own.resize(kPiece);
    } catch (const std::bad_alloc &) {  // which must not leave a thread
      error = ENOMEM;
      return;
    }
    for (size_t i; !error && (i = next++) < pieces.size();) {
      const Piece &piece = pieces[i];
      uint8_t *to = copy && piece.offset + piece.bytes <= hot_ ? copy_->get() + piece.offset : own.data();
      for (size_t done = 0; done < piece.bytes;) {
        ssize_t got = pread(file, to + done, piece.bytes - done, (off_t)(piece.offset + done));
        if (got <= 0) {
          error = got < 0 ? errno : EIO;
          return;
        }
        done += (size_t)got;
      }
      checks[i] = crc32(to, piece.bytes);
    }
  };
  int count = std::max(1, std::min((int)std::thread::hardware_concurrency(), kMostLoaders));
  std::vector<std::thread> threads;
  try {
    for (int t = 1; t < count && pieces.size() > 16; ++t) threads.emplace_back(work);
  } catch (const std::system_error &) {
    // fewer threads read as well
  }
  work();
  for (std::thread &thread : threads) thread.join();
  close(file);
  if (error) throw Failure(HALO_IO, "%s cannot be read: %s", path_.c_str(), strerror(error));
  for (size_t i = 0; i < pieces.size();) {
    uint32_t t = pieces[i].tensor;
    size_t first = i;
    while (i < pieces.size() && pieces[i].tensor == t) ++i;
    if (crc32((const uint8_t *)&checks[first], 4 * (i - first)) != entries[t].check)
      throw Failure(HALO_FORMAT, "the tensor %.48s of %s is damaged", entries[t].name, path_.c_str());
  }
}

}  // namespace halo
