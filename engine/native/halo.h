/* The C ABI of a halo backend: whole-model calls, not kernels. Every backend library (cpu, hip) implements it.
 *
 * Every function that can fail returns a halo_status; halo_last_error() then holds one sentence, per thread, until
 * the next call of that thread. No call aborts the process or lets a C++ exception out. Pointers may be NULL only
 * where this header says so. Handles of models may be used from several threads; a session from one at a time (a
 * second caller gets HALO_BUSY). Little-endian hosts only. */
#ifndef HALO_H
#define HALO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HALO_API __attribute__((visibility("default")))

#define HALO_ABI_VERSION 4u

typedef enum halo_status {
  HALO_OK = 0,
  HALO_INVALID = 1,     /* an argument is out of its range */
  HALO_IO = 2,          /* a file cannot be opened or mapped */
  HALO_FORMAT = 3,      /* a file is damaged, of another version, or lies about itself */
  HALO_UNSUPPORTED = 4, /* this machine cannot do what was asked */
  HALO_NO_MEMORY = 5,
  HALO_BUSY = 6,    /* the session is running in another thread */
  HALO_NUMERIC = 7, /* an activation is not finite: the weights are damaged */
  HALO_INTERNAL = 8,
  HALO_LOST = 9 /* the device stopped answering: close its models and sessions, and open them again */
} halo_status;

typedef struct halo_model halo_model;
typedef struct halo_session halo_session;

typedef struct halo_config {
  int32_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, vocab_size, max_seq_len;
  int32_t tie_embeddings;
  int32_t activation; /* of the gate: 0 is max(x, 0)^2, 1 is silu */
  int32_t sub_norms;  /* whether there are norms before the output and the down projection */
  int32_t head_dim;
  float rope_theta, rms_norm_eps;
} halo_config;

/* HALO_ABI_VERSION of the library; a caller built for another number must not call on. */
HALO_API uint32_t halo_abi_version(void);

/* The sentence of this thread's last failure; never NULL, empty if there was none. */
HALO_API const char *halo_last_error(void);

/* What the library found on this machine, as one JSON object. Writes at most `capacity` bytes with the closing NUL;
 * *needed gets the full size with it. HALO_INVALID if it does not fit. */
HALO_API halo_status halo_device_facts(char *buffer, size_t capacity, size_t *needed);

/* Load a prepared file (model.halo), every byte of it checked. It must not change while the model is open. */
HALO_API halo_status halo_model_open(const char *path, halo_model **model);
HALO_API halo_status halo_model_config(const halo_model *model, halo_config *config);

/* Close the handle (NULL is allowed). Sessions made from it go on; the last of them unmaps the file. */
HALO_API void halo_model_close(halo_model *model);

/* Make a session of `slots` sequences with room for `context` tokens each (at most max_seq_len).
 * threads: 0 means one per usable CPU. path: NULL means the best this CPU has; else its name in the facts.
 * kv: the form of the KV cache, "f32", "f16", "int8" or "rotor3"; NULL means the default. */
HALO_API halo_status halo_session_create(halo_model *model, int32_t slots, int32_t context, int32_t threads,
                                         const char *path, const char *kv, halo_session **session);

/* The session's own facts (path, threads, slots, context, form and bytes of its KV cache), as halo_device_facts. */
HALO_API halo_status halo_session_facts(halo_session *session, char *buffer, size_t capacity, size_t *needed);
HALO_API void halo_session_close(halo_session *session);

/* Flags of halo_session_run. */
#define HALO_RUN_ARGMAX 1u /* write to `ids` the arg max (the lowest id on a tie) instead of logits */

/* Run n tokens through the model. Entry i is tokens[i] at position positions[i] of sequence slots[i]. Positions of
 * a slot must be filled in order; a lower one rewinds the slot and writes over it. For each i with want[i] != 0
 * one result is written, in order: `vocab_size` floats to logits, or one id to ids with HALO_RUN_ARGMAX.
 * logits_count and ids_count are the room there, in elements; the array that is not written to may be NULL.
 * All arguments are checked before anything runs. If the run fails later (HALO_NUMERIC), the slots named in it are
 * rewound to the lowest position written. Results do not depend on the path, the threads or what else is in the batch. */
HALO_API halo_status halo_session_run(halo_session *session, int32_t n, const int32_t *tokens, const int32_t *slots,
                                      const int32_t *positions, const uint8_t *want, uint32_t flags, float *logits,
                                      size_t logits_count, int32_t *ids, size_t ids_count);

/* As halo_session_run, but of each wanted entry the token at which logit + noise is largest, the lowest id on a tie.
 * noise: vocab_size floats for each wanted entry (with those of Gumbel, times the temperature, a draw from the softmax).
 * Also what is near: the tokens whose logit is at least the winner's, or within `depth` of one of the largest, rising,
 * with their logits: found[k] of the k-th wanted entry at ids + k * room and logits + k * room; found[k] is -1 where
 * they are more than `room`, and where room is 0. Every other token's logit is certain to be below the winner's.
 * wanted_count is the room in winners, noise (in rows), found, ids and logits (in rows of `room`). */
HALO_API halo_status halo_session_draw(halo_session *session, int32_t n, const int32_t *tokens, const int32_t *slots,
                                       const int32_t *positions, const uint8_t *want, const float *noise, float depth,
                                       size_t room, size_t wanted_count, int32_t *winners, int32_t *found, int32_t *ids,
                                       float *logits);

/* All logits of the k-th entry that the last run wanted: what halo_session_run would have written. Only after a run that
 * ended well, had at most HALO_AGAIN entries, and rewound no slot on its way. */
#define HALO_AGAIN 96
HALO_API halo_status halo_session_logits(halo_session *session, int32_t k, float *logits, size_t logits_count);

/* Let slot `to` hold the first `length` tokens of slot `from`, another slot, which holds at least so many: what `to` held is
 * gone, `from` stays as it is. Results that follow are those that the same tokens would give, had `to` run them. */
HALO_API halo_status halo_session_copy(halo_session *session, int32_t from, int32_t to, int32_t length);

/* One ternary product on its own, so that the exactness of a path can be checked from outside.
 * codes: the tiles of engine/formats/tiles.py; x: int8 [tokens][cols]; sums: int32 [tokens][rows] = sum over j of
 * (code - 1) * x. */
HALO_API halo_status halo_ternary_sums(const char *path, const uint8_t *codes, int32_t rows, int32_t cols,
                                       const int8_t *x, int32_t tokens, int32_t *sums);

#ifdef __cplusplus
}
#endif
#endif
