/* A decoder layer but for its routed experts, as its caller describes it: what kernels.c computes of it, and router_end.c puts
 * together. Packed weights are of collegium_pack; what else is in the model's type is said so, all other numbers are float. */

#ifndef COLLEGIUM_LAYER_H
#define COLLEGIUM_LAYER_H

#include <stdint.h>

/* Heads that look at what is cached of a sequence. Where rotary is not 0, keys are latent: one head of W numbers, which stand for
 * values too, beside `rotary` numbers in the pool of values. */
struct attention {
    int64_t H, G, W, rotary, window, block_tokens;
    float scaling;
    int32_t is_bf16;
    const float *sinks;  /* [H] a score of each head's that takes its share and gives nothing; NULL: none */
    const float *by_distance; /* [H, num_distances] added to a head's scores by how far back a position is; NULL: nothing */
    int64_t num_distances;    /* farther ones have the last one's */
    void *keys, *values; /* pools: [slots, G * W], and that or [slots, rotary], in the model's type */
};

struct norm {
    const float *weight, *bias;
    float eps;
    int32_t is_centred; /* LayerNorm, where bias may be NULL; else by the root of the mean square */
};

enum gate_kind {
    SOFTMAX_GATE,        /* the highest of a softmax over all */
    CHOSEN_SOFTMAX_GATE, /* a softmax over the highest */
    SIGMOID_GATE,        /* the highest of sigmoid + correction; weights without the correction */
    SPARSE_MIXER_GATE,   /* two, each by a softmax over what is near it */
};

struct gate {
    const void *weight, *bias; /* packed [E, D]; [E] or NULL */
    const float *correction;   /* [E] or NULL */
    int64_t num_groups, kept_groups, group_tops; /* experts in equal groups, of which some are kept, by the sum of their highest */
    int64_t num_shared; /* experts E, E + 1 .. that every row has, of weight 1; they are the last of its K */
    int32_t kind;
    int32_t is_bf16; /* weight and bias: a gate may be float in a model that is not */
    float power;     /* chosen weights are divided by their norm of this power; 0: they are not */
    float scale, jitter, unused;
};

struct expert_shape {
    int64_t D, F;
    int32_t is_bf16, has_bias, activation;
    int32_t is_gated; /* else there is no up: act(x @ gate.T) @ down.T */
    float clamp, alpha;
    int64_t up_at, down_at, gate_up_bias_at, down_bias_at; /* offsets in an expert's bytes */
};

/* An expert that every row has: a layer's dense part, or the one that its rows share. */
struct mlp {
    const struct expert_shape *shape; /* NULL: there is none */
    const void *weights;
    const void *gate; /* packed [1, D]: its sigmoid is the result's weight; NULL: 1 */
};

/* Attention to a source of its own, between a decoder's attention to itself and what follows: its keys and values lie in the same
 * pools, in blocks of their own. */
struct cross {
    const void *query, *query_bias; /* [H * W, D]; NULL: there is none */
    const void *out, *out_bias;     /* [D, H * W] */
    struct norm norm;
};

enum head_norms { NO_HEAD_NORMS, EACH_HEAD, ALL_HEADS, EACH_ROTATED }; /* by a weight [width], by one of all heads as one row */

struct layer {
    struct attention attention; /* the first: a layer is one too */
    int64_t D, E, K;            /* E: that the gate scores; 0 where there are no routed experts: then mlp is what the layer has */
    int64_t head_width;         /* of queries as they are projected */
    int64_t value_width;        /* of a head's result */
    int64_t rotate_from, rotated; /* what is rotated of a head */
    int64_t query_rank;         /* of latent queries; 0: they are projected at once */
    int32_t head_norms, unused;
    float clip, residual;       /* bound of queries, keys and values, 0: none; what the layer adds is multiplied by */
    struct norm input_norm, output_norm, query_norm, key_norm; /* the last two of heads, or of latents */
    const void *qkv, *qkv_bias; /* queries or their latents above keys above values, or above latents above the rotated keys */
    const void *query_up;       /* [H * head_width, query_rank] */
    const void *absorb, *value_up; /* of latents, by head: [W, head_width - rotary] and [value_width, W], each so many bytes: */
    int64_t absorb_bytes, value_up_bytes;
    const void *up;             /* of latents, for prompts, whose keys are expanded: [H * (head_width - rotary + value_width), W] */
    const void *out, *out_bias; /* [D, H * value_width] */
    struct gate gate;
    struct mlp mlp;
    struct cross cross;
};

int64_t collegium_scratch_floats(const struct layer *layer);
void collegium_qkv(const struct layer *layer, const float *h, const float *cos, const float *sin, const int64_t *slots,
                   int64_t T, float *q, float *scratch, int num_threads);
int collegium_attend(const struct layer *layer, const float *q, const int64_t *blocks, const int64_t *first_block,
                     const int64_t *lengths, int64_t B, float *out, int num_threads);
void collegium_query_source(const struct layer *layer, const float *attended, float *h, int64_t T, float *q, float *scratch,
                            int num_threads);
void collegium_attend_source(const struct layer *layer, const float *q, const int64_t *blocks, const int64_t *first_block,
                             const int64_t *lengths, int64_t B, float *out, int num_threads);
int collegium_attend_around(const struct layer *layer, const float *q, const int64_t *lengths, int64_t N,
                            const float *by_distance, int64_t farthest, float *out, int num_threads);
void collegium_output(const struct layer *layer, const float *attended, float *h, int64_t T, void *x, int64_t *ids,
                      float *weights, float *scratch, int num_threads);
int collegium_mlp(const struct layer *layer, const void *x, int64_t T, float *h, int num_threads);
void collegium_foretell(const struct layer *layer, const void *x, int64_t T, int32_t *ids, float *scratch, int num_threads);
void collegium_add(float *h, const void *y, int64_t n, float scale, int is_bf16);
void collegium_embed(float *h, const void *table, const int64_t *tokens, int64_t T, int64_t D, float scale, int is_bf16);
void collegium_norm_rows(void *x, const float *h, const struct norm *norm, int64_t T, int64_t D, int is_bf16, float *scratch);

#endif
