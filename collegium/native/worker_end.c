/* A worker's end of its links: their bytes from the first dispatch to the last reply, and the batches between.
 *
 * Reads dispatches and hints, joins what several routers ask of a layer, computes where every expert is in a slot, answers.
 * Comes back where there is something to decide: an expert is missing, a dispatch cannot be served as it is, a hint names
 * what is not here, a link has ended, the control descriptor is readable. Knows no model and no policy. One thread owns an
 * end; only the tables of weights and leases are shared. A peer can fill no memory but its own credits', and all links
 * together no more than the budget. Linux. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "frame.h"

int collegium_serve(const void *shape, const void *x, int64_t R, const int64_t *pair_rows, const float *pair_weights,
                    int64_t P, const int64_t *counts, const void *const *weights, int64_t G, void *out, int num_threads);

enum { CONTROL = 1, ENDED = 2, HINTS = 4, BATCH = 8, ARRIVED = 16, FULL = 32 }; /* why a call came back; 0: time is over */
enum slot_state { FREE, READING, HELD, ODD, TAKEN, OWED };
enum reason { OPEN, CLOSED_BY_PEER, BROKE, BAD_HEADER, NO_CREDIT, TWICE, BAD_HINT, SLOW_FRAME, SLOW_READER, NO_MEMORY };

#define ALIGN 64
#define KEPT_BYTES (1 << 20)       /* of a credit's memory, while nothing is in flight there */
#define KEPT_SCRATCH (32 << 20)    /* of the memory of joined batches */
#define MOST_JOINED_ROWS 4096      /* bounds the activations of one batch */
#define MOST_HINTS 32              /* of one link before others have their turn */
#define MOST_EVENTS 32
#define MAX_KEPT_HINTS 64          /* older advice is stale */
#define NOTICE_BYTES 1536          /* WELCOME, or a PROGRESS */
#define LOOK_NS 1000000000         /* between looks at who is late */
#define MAX_VISIT_WORDS (1 << 16)
#define MAX_LOG_WORDS (1 << 13)
#define MAX_SPANS 1024
#define MAX_EXPERTS 65536 /* that a frame can name */

#define WAITS 0.5  /* of the time that a router takes from layer to layer, a batch waits for others at most */
#define LATE 1.25  /* an expected dispatch may take so much longer than usual */
#define ACTIVE 6.0 /* a router that has not been heard of for so many of its layers is idle */

struct slot { /* one credit: a dispatch from its header to the last byte of its reply */
    struct link *link;
    struct slot *next_owed;
    uint8_t *memory, *body, *x;
    int64_t capacity;
    enum slot_state state;
    int is_alone; /* computed by itself: together with others it has failed */
    uint64_t seq, epoch;
    int64_t step, micro_batch, layer, deadline_us, rows, pairs, groups, prompts, text_bytes, body_bytes, received_ns, turn;
    /* its reply: what is left of the header's and the body's bytes */
    int64_t out_bytes, out_sent;
    uint8_t head[HEADER_BYTES];
};

struct link {
    struct link *next;
    int64_t id;
    int fd;
    int is_gone;   /* removed, but for slots that are taken */
    int is_parked; /* not read until there is memory */
    uint32_t events;
    enum reason reason;
    int error; /* errno, where it BROKE */
    /* what was agreed */
    int64_t D, row_bytes, reply_row_bytes, max_rows, max_pairs, max_groups, num_slots;
    uint8_t dtype, reply_dtype, flags;
    struct slot *slots;
    struct slot *first_owed, *last_owed;
    /* the frame that is being read */
    uint8_t head[HEADER_BYTES];
    int64_t got, begun_ns;
    struct slot *reading;
    uint8_t *hint;
    int64_t hint_bytes, hint_capacity;
    /* what goes out before any reply */
    uint8_t notice[NOTICE_BYTES];
    int64_t notice_begin, notice_end;
    int64_t moved_ns; /* when the peer last took bytes, or had taken all */
    int64_t offset_us, updated_us; /* our clock minus the router's, and when that was learnt */
    int64_t last_layer, last_ns, layer_ns; /* where its router was met last, and how long it takes from layer to layer */
    int64_t turn; /* the end of its last dispatch's, see wait_turn */
    int64_t *stats; /* [9] the caller's: dispatches, hints, rows out, back, pairs, bytes out, back, late, expired */
};

enum stat { DISPATCHES, HINTS_READ, ROWS_OUT, ROWS_BACK, PAIRS_OUT, BYTES_OUT, BYTES_BACK, LATE_REPLIES, EXPIRED };
enum total { T_DISPATCHES, T_ROWS, T_PAIRS, T_BATCHES, T_JOINED_BATCHES, T_JOINED, T_GROUPS, T_COMPUTE_NS, T_WAIT_NS,
             T_JOIN_WAIT_NS, T_ANSWERS, T_FAILED, T_HITS, T_WHOLE, T_PARKED, NUM_TOTALS };

struct hint {
    int64_t link_id, layer, groups;
    uint16_t *experts; /* [2 * groups] experts, then counts */
};

struct span { /* of a dispatch that is traced */
    int64_t layer, pairs, groups, joined, wait_ns, began_ns, ended_ns, text_bytes;
    char text[MAX_TEXT_BYTES];
};

struct worker_end {
    int epoll_fd;
    struct link *links;
    int64_t num_links;
    struct slot **held; /* whole and waiting, in their turn */
    int64_t num_held, most_held, held_capacity; /* most_held: credits of all links, gone ones with taken slots too */
    int64_t budget, used, num_parked; /* bytes of memory of all links' slots */
    int64_t frame_ns, reader_ns;      /* how long a frame may take to come, and a reply may wait without a byte taken */
    int64_t next_look_ns, last_ns, left_ns, turn; /* turn: where that of the last dispatch that was taken began */
    int flags, owes_batch; /* owes_batch: the last call left dispatches for the caller's sake */
    /* experts */
    const void *shape;
    const void *const *weights; /* [L, E] packed experts; NULL: not there. Others write it */
    uint8_t *leases;            /* [L, E] not 0: computed from; who takes an expert out waits for the end of that */
    int64_t *num_experts;       /* [L] */
    int64_t L, E, D;
    uint8_t dtype;
    int num_threads, notes_visits, keeps_hints;
    /* the batch at hand, and memory to join in */
    struct slot **batch;
    int64_t num_batch, batch_rows, batch_pairs, batch_groups, batch_layer, batch_decode;
    const uint8_t *batch_x;
    uint8_t *x, *out;
    int64_t x_capacity, out_capacity, pairs_capacity;
    int64_t *pair_rows, *counts, *at, *of_decode, *experts; /* [P]; the rest [E] */
    uint8_t *seen; /* [65536] 0 between uses */
    float *pair_weights;
    const void **chosen;
    /* what is told afterwards */
    int64_t *visits, num_visits, *log, num_log, *met;
    struct hint hints[MAX_KEPT_HINTS];
    int64_t num_hints;
    uint16_t *told; /* the hint that was told last */
    struct span *spans;
    int64_t num_spans;
    int64_t *totals, unheard[EXPIRED + 1]; /* totals: the caller's; unheard: of links that are gone */
};

/* --- memory --- */

static uint8_t *aligned_memory(int64_t bytes)
{
    void *memory = NULL;
    return posix_memalign(&memory, ALIGN, (size_t)(bytes + ALIGN - 1) / ALIGN * ALIGN) ? NULL : memory;
}

static void drop_memory(struct worker_end *e, struct slot *slot)
{
    free(slot->memory);
    e->used -= slot->capacity;
    slot->memory = NULL;
    slot->capacity = 0;
}

static void watch(struct worker_end *e, struct link *link)
{
    uint32_t events = link->is_parked ? 0 : EPOLLIN;
    if (link->first_owed || link->notice_end > link->notice_begin)
        events |= EPOLLOUT;
    if (events == link->events || link->fd < 0 || link->reason)
        return;
    struct epoll_event event = {.events = events, .data.ptr = link};
    epoll_ctl(e->epoll_fd, EPOLL_CTL_MOD, link->fd, &event);
    link->events = events;
}

static void unpark(struct worker_end *e)
{
    for (struct link *link = e->links; e->num_parked && link; link = link->next)
        if (link->is_parked) {
            link->is_parked = 0;
            link->begun_ns = now_ns();
            e->num_parked--;
            watch(e, link);
        }
}

/* Have memory of so many bytes in a slot. 0; 1: not now, others have it; -1: there is none. */
static int fit(struct worker_end *e, struct slot *slot, int64_t bytes)
{
    if (bytes <= slot->capacity)
        return 0;
    bytes = (bytes + 4095) & ~(int64_t)4095;
    if (e->used - slot->capacity + bytes > e->budget) {
        for (struct link *link = e->links; link; link = link->next) /* what nobody uses */
            for (struct slot *one = link->slots; one < link->slots + link->num_slots; one++)
                if (one->state == FREE && one != slot && one->memory)
                    drop_memory(e, one);
        if (e->used > slot->capacity && e->used - slot->capacity + bytes > e->budget)
            return 1;
    }
    uint8_t *memory = aligned_memory(bytes);
    if (!memory)
        return -1;
    drop_memory(e, slot);
    slot->memory = memory;
    slot->capacity = bytes;
    e->used += bytes;
    return 0;
}

static void release(struct worker_end *e, struct slot *slot)
{
    slot->state = FREE;
    slot->is_alone = 0;
    if (slot->capacity > KEPT_BYTES)
        drop_memory(e, slot);
    if (e->num_parked)
        unpark(e);
}

static int grow(uint8_t **memory, int64_t *capacity, int64_t bytes)
{
    if (bytes <= *capacity)
        return 0;
    free(*memory);
    *memory = aligned_memory(bytes);
    *capacity = *memory ? bytes : 0;
    return *memory ? 0 : -1;
}

static void shrink(uint8_t **memory, int64_t *capacity)
{
    if (*capacity <= KEPT_SCRATCH)
        return;
    free(*memory);
    *memory = NULL;
    *capacity = 0;
}

/* --- links --- */

static void end_link(struct worker_end *e, struct link *link, enum reason reason, int error)
{
    if (link->reason || link->is_gone)
        return;
    link->reason = reason;
    link->error = error;
    epoll_ctl(e->epoll_fd, EPOLL_CTL_DEL, link->fd, NULL);
    if (link->is_parked) {
        link->is_parked = 0;
        e->num_parked--;
    }
    e->flags |= ENDED;
}

/* Take what is not in anybody's hands from a link that is over. */
static void empty_link(struct worker_end *e, struct link *link)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < e->num_held; i++)
        if (e->held[i]->link != link)
            e->held[kept++] = e->held[i];
    e->num_held = kept;
    for (struct slot *slot = link->slots; slot < link->slots + link->num_slots; slot++)
        if (slot->state != TAKEN && slot->state != FREE)
            release(e, slot);
    link->first_owed = link->last_owed = NULL;
    link->reading = NULL;
    link->notice_begin = link->notice_end = 0;
}

static void free_if_gone(struct worker_end *e, struct link *link)
{
    if (!link->is_gone)
        return;
    for (struct slot *slot = link->slots; slot < link->slots + link->num_slots; slot++)
        if (slot->state == TAKEN)
            return;
    for (struct link **at = &e->links; *at; at = &(*at)->next)
        if (*at == link) {
            *at = link->next;
            e->most_held -= link->num_slots;
            break;
        }
    for (struct slot *slot = link->slots; slot < link->slots + link->num_slots; slot++)
        drop_memory(e, slot);
    if (e->num_parked)
        unpark(e);
    free(link->hint);
    free(link->slots);
    free(link);
}

/* Send of a notice and replies what the peer takes. */
static void flush(struct worker_end *e, struct link *link)
{
    while (!link->reason) {
        struct iovec parts[2];
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 1};
        struct slot *slot = NULL;
        if (link->notice_end > link->notice_begin)
            parts[0] = (struct iovec){link->notice + link->notice_begin, (size_t)(link->notice_end - link->notice_begin)};
        else if ((slot = link->first_owed)) {
            int64_t sent = slot->out_sent, left = slot->out_bytes - sent;
            if (sent < HEADER_BYTES) {
                parts[0] = (struct iovec){slot->head + sent, (size_t)(HEADER_BYTES - sent)};
                parts[1] = (struct iovec){slot->memory, (size_t)(left - (HEADER_BYTES - sent))};
                message.msg_iovlen = 2;
            } else
                parts[0] = (struct iovec){slot->memory + sent - HEADER_BYTES, (size_t)left};
        } else
            break;
        ssize_t taken = sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                end_link(e, link, BROKE, errno);
            break;
        }
        link->moved_ns = now_ns();
        if (!slot) {
            link->notice_begin += taken;
            continue;
        }
        slot->out_sent += taken;
        if (slot->out_sent == slot->out_bytes) {
            link->first_owed = slot->next_owed;
            if (!link->first_owed)
                link->last_owed = NULL;
            release(e, slot);
        }
    }
    watch(e, link);
}

static void post(struct worker_end *e, struct link *link, const uint8_t *frame, int64_t bytes)
{
    if (link->notice_begin == link->notice_end)
        link->notice_begin = link->notice_end = 0;
    if (link->reason || link->notice_end + bytes > NOTICE_BYTES)
        return;
    memcpy(link->notice + link->notice_end, frame, (size_t)bytes);
    link->notice_end += bytes;
    flush(e, link);
}

/* Answer a dispatch, and give its credit back once all of that has left. What the socket does not take now stays. */
static void answer(struct worker_end *e, struct slot *slot, enum status status, const uint8_t *y, const uint16_t *missed,
                   int64_t num_missed, int64_t compute_us, int64_t wait_us, const char *text, int64_t text_bytes)
{
    struct link *link = slot->link;
    if (link->is_gone || link->reason) {
        release(e, slot);
        free_if_gone(e, link);
        return;
    }
    int64_t row_bytes = status == STATUS_OK ? slot->rows * link->reply_row_bytes : text_bytes;
    int64_t body = row_bytes + 2 * num_missed;
    uint8_t *head = slot->head;
    memset(head, 0, HEADER_BYTES);
    put(head + AT_MAGIC, MAGIC, 2);
    head[AT_VERSION] = VERSION;
    head[AT_KIND] = REPLY;
    head[AT_STATUS] = (uint8_t)status;
    head[AT_FLAGS] = e->keeps_hints ? 0 : NO_HINTS;
    put(head + AT_SEQ, slot->seq, 8);
    put(head + AT_BODY, (uint64_t)body, 4);
    put(head + AT_COMPUTE_US, compute_us < 0 ? 0 : (uint64_t)compute_us, 4);
    put(head + AT_WAIT_US, wait_us < 0 ? 0 : (uint64_t)wait_us, 4);
    put(head + AT_MISSES, (uint64_t)num_missed, 4);
    if (status == STATUS_OK) {
        head[AT_DTYPE] = link->reply_dtype;
        put(head + AT_REPLY_ROWS, (uint64_t)slot->rows, 4);
        link->stats[ROWS_BACK] += slot->rows;
    }
    put(head + AT_SENT_US, (uint64_t)(now_ns() / 1000), 8);
    link->stats[BYTES_BACK] += HEADER_BYTES + body;
    slot->out_bytes = HEADER_BYTES + body;
    slot->out_sent = 0;
    const void *rows = status == STATUS_OK ? (const void *)y : (const void *)text;
    if (!link->first_owed && link->notice_begin == link->notice_end) {
        struct iovec parts[3] = {{head, HEADER_BYTES}, {(void *)rows, (size_t)row_bytes}, {(void *)missed, 2 * (size_t)num_missed}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
        ssize_t sent;
        do
            sent = sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        if (sent == slot->out_bytes) {
            release(e, slot);
            return;
        }
        if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
            end_link(e, link, BROKE, errno);
            release(e, slot);
            return;
        }
        slot->out_sent = sent < 0 ? 0 : sent;
        link->moved_ns = now_ns();
    }
    /* the peer's own slowness: more than the budget by what it has asked for, at most */
    if (body > slot->capacity) {
        uint8_t *memory = aligned_memory(body);
        if (!memory) {
            end_link(e, link, NO_MEMORY, 0);
            release(e, slot);
            return;
        }
        memcpy(memory, rows, (size_t)row_bytes);
        drop_memory(e, slot);
        slot->memory = memory;
        slot->capacity = body;
        e->used += body;
    } else
        memmove(slot->memory, rows, (size_t)row_bytes);
    if (num_missed)
        memcpy(slot->memory + row_bytes, missed, 2 * (size_t)num_missed);
    slot->state = OWED;
    slot->next_owed = NULL;
    if (link->last_owed)
        link->last_owed->next_owed = slot;
    else
        link->first_owed = slot;
    link->last_owed = slot;
    watch(e, link);
}

/* The sum of a time and what a peer says is one: any number. */
static int64_t plus(int64_t time, uint64_t said)
{
    return (int64_t)((uint64_t)time + said);
}

static void expire(struct worker_end *e, struct slot *slot, int64_t now_us)
{
    char text[64];
    int length = snprintf(text, sizeof text, "arrived %lld ms past its deadline",
                          (long long)(plus(now_us, -(uint64_t)slot->deadline_us) / 1000));
    slot->link->stats[EXPIRED]++;
    answer(e, slot, STATUS_EXPIRED, NULL, NULL, 0, 0, 0, text, length);
}

/* --- reading --- */

/* A clock's offset is the least of (received - sent), and may rise by a thousandth of the time that passes: a reader that
 * was stopped wakes to stale frames and must see them as old. */
static void hear_clock(struct link *link, int64_t sent_us, int64_t received_us)
{
    int64_t sample = plus(received_us, -(uint64_t)sent_us);
    if (sample > link->offset_us) {
        int64_t rise = (received_us - link->updated_us) / 1000, most = plus(link->offset_us, (uint64_t)rise);
        if (!rise)
            return;
        if (sample > most)
            sample = most;
    }
    link->offset_us = sample;
    link->updated_us = received_us;
}

/* Read up to `wanted` bytes: those taken, 0 where none are here, -1 where the link has ended. */
static int64_t take(struct worker_end *e, struct link *link, void *at, int64_t wanted)
{
    for (;;) {
        ssize_t taken = recv(link->fd, at, (size_t)wanted, MSG_DONTWAIT);
        if (taken > 0)
            return taken;
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        end_link(e, link, taken ? BROKE : CLOSED_BY_PEER, taken ? errno : 0);
        return -1;
    }
}

static int64_t front_bytes(int64_t groups, int64_t pairs)
{
    return 4 * groups + 8 * pairs;
}

static int64_t row_start(int64_t groups, int64_t pairs) /* of memory: rows are aligned, and the front ends there */
{
    return (front_bytes(groups, pairs) + ALIGN - 1) / ALIGN * ALIGN;
}

static void park(struct worker_end *e, struct link *link)
{
    link->is_parked = 1;
    e->num_parked++;
    e->totals[T_PARKED]++;
    watch(e, link);
}

/* Look at a whole header, and find memory for what it announces. 0; -1: the link has ended; 1: later, it is parked. */
static int open_body(struct worker_end *e, struct link *link)
{
    const uint8_t *head = link->head;
    int64_t body = (int64_t)get(head + AT_BODY, 4), groups = (int64_t)get(head + AT_GROUPS, 2);
    if (get(head + AT_MAGIC, 2) != MAGIC || head[AT_VERSION] != VERSION)
        goto bad;
    if (head[AT_KIND] == HINT) {
        if (groups < 1 || groups > link->max_groups || body != 4 * groups)
            goto bad;
        if (body > link->hint_capacity) {
            free(link->hint);
            link->hint = malloc((size_t)body);
            link->hint_capacity = link->hint ? body : 0;
            if (!link->hint) {
                end_link(e, link, NO_MEMORY, 0);
                return -1;
            }
        }
        link->hint_bytes = body;
        return 0;
    }
    int64_t rows = (int64_t)get(head + AT_ROWS, 4), pairs = (int64_t)get(head + AT_PAIRS, 4);
    int64_t prompts = (int64_t)get(head + AT_PROMPTS, 2), text = (int64_t)get(head + AT_TEXT, 2);
    if (head[AT_KIND] != DISPATCH || head[AT_DTYPE] != link->dtype || head[AT_FLAGS] != link->flags || rows < 1 ||
        rows > link->max_rows || pairs < 1 || pairs > link->max_pairs || groups < 1 || groups > pairs ||
        groups > link->max_groups || prompts > rows || text > MAX_TEXT_BYTES ||
        body != front_bytes(groups, pairs) + rows * link->row_bytes + text)
        goto bad;
    uint64_t seq = get(head + AT_SEQ, 8);
    struct slot *found = NULL;
    for (struct slot *slot = link->slots; slot < link->slots + link->num_slots; slot++)
        if (slot->state != FREE) {
            if (slot->seq == seq) {
                end_link(e, link, TWICE, 0);
                return -1;
            }
        } else if (!found || slot->capacity > found->capacity)
            found = slot;
    if (!found) {
        end_link(e, link, NO_CREDIT, 0);
        return -1;
    }
    int64_t start = row_start(groups, pairs) - front_bytes(groups, pairs);
    int fits = fit(e, found, start + body);
    if (fits) {
        if (fits < 0)
            end_link(e, link, NO_MEMORY, 0);
        else
            park(e, link);
        return fits;
    }
    found->state = READING;
    found->seq = seq;
    found->epoch = get(head + AT_EPOCH, 8);
    found->step = (int64_t)get(head + AT_STEP, 4);
    found->micro_batch = head[AT_MICRO_BATCH];
    found->layer = (int64_t)get(head + AT_LAYER, 2);
    found->rows = rows;
    found->pairs = pairs;
    found->groups = groups;
    found->prompts = prompts;
    found->text_bytes = text;
    found->body_bytes = body;
    found->body = found->memory + start;
    found->x = found->body + front_bytes(groups, pairs);
    link->reading = found;
    return 0;
bad:
    end_link(e, link, BAD_HEADER, 0);
    return -1;
}

static const uint16_t *experts_of(const struct slot *slot)
{
    return (const uint16_t *)slot->body;
}

static const uint16_t *counts_of(const struct slot *slot)
{
    return experts_of(slot) + slot->groups;
}

static const uint32_t *pair_rows_of(const struct slot *slot)
{
    return (const uint32_t *)(counts_of(slot) + slot->groups);
}

static const float *pair_weights_of(const struct slot *slot)
{
    return (const float *)(pair_rows_of(slot) + slot->pairs);
}

/* Whether what a dispatch says can be: counts that add up, experts that there are, each once, rows that there are. */
static int is_sound(struct worker_end *e, const struct slot *slot)
{
    const uint16_t *experts = experts_of(slot), *counts = counts_of(slot);
    const uint32_t *pair_rows = pair_rows_of(slot);
    int64_t total = 0, bound = 65536;
    if (e->L) {
        if (slot->layer >= e->L)
            return 0;
        bound = e->num_experts[slot->layer];
    }
    for (int64_t g = 0; g < slot->groups; g++) {
        if (experts[g] >= bound || !counts[g])
            return 0;
        total += counts[g];
    }
    for (int64_t p = 0; p < slot->pairs; p++)
        if (pair_rows[p] >= slot->rows)
            return 0;
    if (total != slot->pairs)
        return 0;
    int is_distinct = 1;
    for (int64_t g = 0; g < slot->groups; g++)
        is_distinct &= !e->seen[experts[g]], e->seen[experts[g]] = 1;
    for (int64_t g = 0; g < slot->groups; g++)
        e->seen[experts[g]] = 0;
    return is_distinct;
}

/* Until when a layer's rows wait for those of other routers; a time that has passed: no longer. links: num of [4] last layer,
 * when that was, ns from layer to layer, whether its rows are among those that wait. Held back again and again by a part of
 * a layer's time, routers come together, and each expert is read once for all of them. */
int64_t collegium_join_until(const int64_t *links, int64_t num, int64_t L, int64_t layer, int64_t arrived_ns)
{
    int64_t layer_ns = 0, until = 0;
    for (const int64_t *one = links; one < links + 4 * num; one += 4)
        if (one[3] && one[2] > layer_ns)
            layer_ns = one[2];
    int64_t longest = arrived_ns + (int64_t)(WAITS * (double)layer_ns);
    for (const int64_t *one = links; one < links + 4 * num; one += 4) {
        if (one[3] || !one[2])
            continue;
        int64_t behind = ((layer - one[0]) % L + L) % L;
        if (behind < 1 || behind > L / 2 || (double)(arrived_ns - one[1]) >= ACTIVE * (double)one[2])
            continue;
        int64_t expected = one[1] + (int64_t)((double)behind * LATE * (double)one[2]);
        expected = expected < longest ? expected : longest;
        until = expected > until ? expected : until;
    }
    return until;
}

/* Take notice of where a router is; of each that begins a step, who else is active is told. */
static void meet(struct worker_end *e, struct link *link, const struct slot *slot)
{
    int64_t now = slot->received_ns, L = e->L ? e->L : 65536;
    if (link->last_layer >= 0 && slot->layer == (link->last_layer + 1) % L) {
        int64_t gap = now - link->last_ns, usual = link->layer_ns ? link->layer_ns : gap;
        int64_t found = (4 * usual + gap) / 5;
        link->layer_ns = found < 2 * usual ? found : 2 * usual; /* one long pause is no habit */
    }
    link->last_layer = slot->layer;
    link->last_ns = now;
    if (slot->layer || e->num_links < 2 || e->num_log + 4 + e->num_links > MAX_LOG_WORDS)
        return;
    int64_t *entry = e->log + e->num_log, num = 0;
    entry[0] = link->id;
    entry[1] = slot->rows - slot->prompts;
    entry[2] = now;
    for (const struct link *one = e->links; one; one = one->next)
        if (!one->is_gone && (double)(now - one->last_ns) < ACTIVE * (double)one->layer_ns)
            entry[4 + num++] = one->id;
    entry[3] = num;
    e->num_log += 4 + num;
}

/* What a dispatch costs, in rows: each expert that it needs is read once, which costs about as much as a row. */
static int64_t cost_of(const struct slot *slot)
{
    return slot->rows + slot->groups;
}

/* Queue a dispatch among those that wait. Links have turns by what they ask: one that asks for a few rows doesn't wait for all that
 * others have sent before, and nobody waits for ever (Demers, Keshav and Shenker, fair queueing, 1989). */
static void wait_turn(struct worker_end *e, struct link *link, struct slot *slot)
{
    int64_t i = e->num_held++;
    slot->turn = link->turn = (link->turn > e->turn ? link->turn : e->turn) + cost_of(slot);
    for (; i > 0 && e->held[i - 1]->turn > slot->turn; i--)
        e->held[i] = e->held[i - 1];
    e->held[i] = slot;
}

static void finish_dispatch(struct worker_end *e, struct link *link)
{
    struct slot *slot = link->reading;
    int64_t now = now_ns();
    link->reading = NULL;
    link->got = link->begun_ns = 0;
    slot->received_ns = e->last_ns = now > e->last_ns ? now : e->last_ns + 1; /* no two arrive at the same time */
    int64_t *stats = link->stats;
    stats[DISPATCHES]++;
    stats[ROWS_OUT] += slot->rows;
    stats[PAIRS_OUT] += slot->pairs;
    stats[BYTES_OUT] += HEADER_BYTES + slot->body_bytes;
    hear_clock(link, (int64_t)get(link->head + AT_SENT_US, 8), now / 1000);
    slot->deadline_us = plus(link->offset_us, get(link->head + AT_DEADLINE_US, 8));
    if (!is_sound(e, slot)) {
        slot->state = ODD;
        e->flags |= ARRIVED;
    } else if (slot->deadline_us <= now / 1000) {
        expire(e, slot, now / 1000);
        return;
    } else
        slot->state = HELD;
    wait_turn(e, link, slot);
    meet(e, link, slot);
}

/* 0 where the hint has been taken in, -1 where the link has ended. */
static int finish_hint(struct worker_end *e, struct link *link)
{
    int64_t groups = link->hint_bytes / 4, layer = (int64_t)get(link->head + AT_LAYER, 2);
    uint16_t *experts = (uint16_t *)link->hint, *counts = experts + groups;
    link->stats[HINTS_READ]++;
    link->stats[BYTES_OUT] += HEADER_BYTES + link->hint_bytes;
    hear_clock(link, (int64_t)get(link->head + AT_SENT_US, 8), now_ns() / 1000);
    link->got = link->begun_ns = 0;
    link->hint_bytes = 0;
    int is_bad = 0, is_all_here = e->weights && layer < e->L;
    for (int64_t g = 0; g < groups; g++) {
        is_bad |= !counts[g] || e->seen[experts[g]];
        e->seen[experts[g]] = 1;
        is_all_here = is_all_here && experts[g] < e->E &&
                      __atomic_load_n(e->weights + layer * e->E + experts[g], __ATOMIC_RELAXED) != NULL;
    }
    for (int64_t g = 0; g < groups; g++)
        e->seen[experts[g]] = 0;
    if (is_bad) {
        end_link(e, link, BAD_HINT, 0);
        return -1;
    }
    if (is_all_here || !e->keeps_hints)
        return 0;
    if (e->num_hints == MAX_KEPT_HINTS) {
        free(e->hints[0].experts);
        memmove(e->hints, e->hints + 1, (MAX_KEPT_HINTS - 1) * sizeof *e->hints);
        e->num_hints--;
    }
    e->hints[e->num_hints++] = (struct hint){link->id, layer, groups, experts};
    link->hint = NULL; /* the hint's now */
    link->hint_capacity = 0;
    e->flags |= HINTS;
    return 0;
}

/* Read one dispatch of a link at most, or as much of it as is here. */
static void read_link(struct worker_end *e, struct link *link)
{
    for (int hints = 0; hints < MOST_HINTS && !link->reason;) {
        if (!link->reading && !link->hint_bytes) {
            if (link->got < HEADER_BYTES) {
                int64_t taken = take(e, link, link->head + link->got, HEADER_BYTES - link->got);
                if (taken <= 0)
                    return;
                if (!link->begun_ns)
                    link->begun_ns = now_ns();
                link->got += taken;
                if (link->got < HEADER_BYTES)
                    return;
            }
            if (open_body(e, link))
                return;
            link->got = HEADER_BYTES;
        }
        int64_t body = link->reading ? link->reading->body_bytes : link->hint_bytes, had = link->got - HEADER_BYTES;
        uint8_t *at = link->reading ? link->reading->body : link->hint;
        int64_t taken = take(e, link, at + had, body - had);
        if (taken <= 0)
            return;
        link->got += taken;
        if (link->got < HEADER_BYTES + body)
            return;
        if (link->reading) {
            finish_dispatch(e, link);
            return; /* the others' turn */
        }
        if (finish_hint(e, link))
            return;
        hints++;
    }
}

/* End links whose frame, or whose peer's reading, takes too long. */
static void look_for_slow(struct worker_end *e, int64_t now)
{
    e->next_look_ns = now + LOOK_NS;
    for (struct link *link = e->links; link; link = link->next) {
        if (link->is_gone || link->reason)
            continue;
        int owes = link->first_owed || link->notice_end > link->notice_begin;
        if (link->begun_ns && !link->is_parked && now - link->begun_ns > e->frame_ns)
            end_link(e, link, SLOW_FRAME, 0);
        else if (owes && now - link->moved_ns > e->reader_ns)
            end_link(e, link, SLOW_READER, 0);
    }
}

/* Move what can be moved, waiting so long at most for anything to do. */
static void move(struct worker_end *e, int64_t wait_ns)
{
    struct epoll_event events[MOST_EVENTS];
    wait_ns = wait_ns < 0 ? 0 : wait_ns > LOOK_NS ? LOOK_NS : wait_ns;
    int64_t away = e->left_ns ? now_ns() - e->left_ns : 0;
    if (away > LOOK_NS) /* computing: nobody was slow but this end */
        for (struct link *link = e->links; link; link = link->next) {
            link->begun_ns += link->begun_ns ? away : 0;
            link->moved_ns += away;
        }
    int num = epoll_wait(e->epoll_fd, events, MOST_EVENTS, (int)((wait_ns + 999999) / 1000000));
    for (int i = 0; i < num; i++) {
        struct link *link = events[i].data.ptr;
        if (!link) {
            e->flags |= CONTROL;
            continue;
        }
        if (events[i].events & EPOLLOUT)
            flush(e, link);
        if (events[i].events & ~(uint32_t)EPOLLOUT && !link->reason) {
            if (link->is_parked) /* it can only have hung up */
                end_link(e, link, CLOSED_BY_PEER, 0);
            else
                read_link(e, link);
        }
    }
    int64_t now = e->left_ns = now_ns();
    if (now >= e->next_look_ns)
        look_for_slow(e, now);
}

/* --- batches --- */

static int have_pairs(struct worker_end *e, int64_t pairs)
{
    if (pairs <= e->pairs_capacity)
        return 0;
    free(e->pair_rows);
    free(e->pair_weights);
    e->pair_rows = malloc((size_t)pairs * sizeof *e->pair_rows);
    e->pair_weights = malloc((size_t)pairs * sizeof *e->pair_weights);
    e->pairs_capacity = e->pair_rows && e->pair_weights ? pairs : 0;
    return e->pairs_capacity ? 0 : -1;
}

/* Join what is in e->batch: rows one dispatch after another's, pairs by expert. -1: there is no memory. */
static int join(struct worker_end *e)
{
    int64_t rows = 0, pairs = 0, groups = 0, decode = 0;
    struct slot *first = e->batch[0];
    int64_t row_bytes = first->link->row_bytes;
    for (int64_t i = 0; i < e->num_batch; i++) {
        rows += e->batch[i]->rows;
        pairs += e->batch[i]->pairs;
        decode += e->batch[i]->rows - e->batch[i]->prompts;
    }
    if (have_pairs(e, pairs))
        return -1;
    e->batch_x = first->x;
    if (e->num_batch > 1 && row_bytes) {
        if (grow(&e->x, &e->x_capacity, rows * row_bytes))
            return -1;
        uint8_t *x = e->x;
        for (int64_t i = 0; i < e->num_batch; x += e->batch[i++]->rows * row_bytes)
            memcpy(x, e->batch[i]->x, (size_t)(e->batch[i]->rows * row_bytes));
        e->batch_x = e->x;
    }
    memset(e->at, 0, (size_t)e->E * sizeof *e->at);
    for (int64_t i = 0; i < e->num_batch; i++) {
        const struct slot *slot = e->batch[i];
        const uint16_t *experts = experts_of(slot), *counts = counts_of(slot);
        const uint32_t *pair_rows = pair_rows_of(slot);
        int64_t decoding = slot->rows - slot->prompts;
        for (int64_t g = 0; g < slot->groups; g++) {
            e->at[experts[g]] += counts[g];
            for (const uint32_t *end = pair_rows + counts[g]; pair_rows < end; pair_rows++)
                e->of_decode[experts[g]] += *pair_rows < decoding;
        }
    }
    int64_t begin = 0;
    for (int64_t expert = 0; expert < e->E; expert++) { /* counts become where each expert's pairs begin */
        int64_t count = e->at[expert];
        e->at[expert] = begin;
        if (!count)
            continue;
        e->experts[groups] = expert;
        e->counts[groups] = count;
        e->of_decode[groups] = e->of_decode[expert]; /* never past it: groups <= expert */
        if (groups != expert)
            e->of_decode[expert] = 0;
        groups++;
        begin += count;
    }
    int64_t first_row = 0;
    for (int64_t i = 0; i < e->num_batch; first_row += e->batch[i++]->rows) {
        const struct slot *slot = e->batch[i];
        const uint16_t *experts = experts_of(slot), *counts = counts_of(slot);
        const uint32_t *pair_rows = pair_rows_of(slot);
        const float *pair_weights = pair_weights_of(slot);
        for (int64_t g = 0, p = 0; g < slot->groups; g++)
            for (int64_t c = 0; c < counts[g]; c++, p++) {
                int64_t at = e->at[experts[g]]++;
                e->pair_rows[at] = pair_rows[p] + first_row;
                e->pair_weights[at] = pair_weights[p];
            }
    }
    e->batch_rows = rows;
    e->batch_pairs = pairs;
    e->batch_groups = groups;
    e->batch_decode = decode;
    e->batch_layer = first->layer;
    return 0;
}

/* Forget the batch's counts of decoding rows, so that all are 0 again. */
static void unjoin(struct worker_end *e)
{
    memset(e->of_decode, 0, (size_t)(e->batch_groups > 0 ? e->batch_groups : 0) * sizeof *e->of_decode);
}

static void note_visit(struct worker_end *e, int64_t began)
{
    int64_t *visit = e->visits + e->num_visits;
    visit[0] = e->batch_layer;
    visit[1] = began;
    visit[2] = e->batch_decode;
    visit[3] = e->batch_groups;
    for (int64_t g = 0; g < e->batch_groups; g++) {
        visit[4 + 2 * g] = e->experts[g];
        visit[5 + 2 * g] = e->of_decode[g];
    }
    e->num_visits += 4 + 2 * e->batch_groups;
}

static void note_span(struct worker_end *e, const struct slot *slot, int64_t began, int64_t ended)
{
    if (e->num_spans == MAX_SPANS)
        return;
    struct span *span = e->spans + e->num_spans++;
    *span = (struct span){slot->layer, slot->pairs, slot->groups, e->num_batch, began - slot->received_ns,
                          began,       ended,       slot->text_bytes, {0}};
    memcpy(span->text, slot->body + slot->body_bytes - slot->text_bytes, (size_t)slot->text_bytes);
}

/* Answer the batch at hand with rows y. missed [num_missed]: experts that had to be loaded for it. */
static void answer_batch(struct worker_end *e, const uint8_t *y, const uint16_t *missed, int64_t num_missed, int64_t began,
                         int64_t ended)
{
    int is_joined = 0;
    for (int64_t i = 0; i < e->num_batch; i++)
        is_joined |= e->batch[i]->link != e->batch[0]->link;
    e->totals[T_BATCHES]++;
    e->totals[T_GROUPS] += e->batch_groups;
    e->totals[T_COMPUTE_NS] += ended - began;
    e->totals[T_DISPATCHES] += e->num_batch;
    e->totals[T_ANSWERS] += e->num_batch;
    e->totals[T_ROWS] += e->batch_rows;
    e->totals[T_PAIRS] += e->batch_pairs;
    if (is_joined) {
        e->totals[T_JOINED_BATCHES]++;
        e->totals[T_JOINED] += e->num_batch;
    }
    uint16_t *own = NULL;
    if (num_missed)
        own = malloc(65536 * sizeof *own);
    for (int64_t i = 0; i < e->num_batch; i++) {
        struct slot *slot = e->batch[i];
        int64_t num_own = 0, rows = slot->rows * slot->link->reply_row_bytes;
        for (int64_t g = 0; own && g < slot->groups; g++)
            for (int64_t m = 0; m < num_missed; m++)
                if (experts_of(slot)[g] == missed[m])
                    own[num_own++] = missed[m];
        e->totals[T_WAIT_NS] += began - slot->received_ns;
        if (slot->text_bytes)
            note_span(e, slot, began, ended);
        answer(e, slot, STATUS_OK, y, own, num_own, (ended - began) / 1000, (began - slot->received_ns) / 1000, NULL, 0);
        y += rows;
    }
    free(own);
    unjoin(e);
    e->num_batch = 0;
    shrink(&e->x, &e->x_capacity);
    shrink(&e->out, &e->out_capacity);
}

static void fail_batch(struct worker_end *e, enum status status, const char *text, int64_t text_bytes)
{
    for (int64_t i = 0; i < e->num_batch; i++) {
        e->totals[T_FAILED]++;
        e->totals[T_ANSWERS]++;
        answer(e, e->batch[i], status, NULL, NULL, 0, 0, 0, text, text_bytes);
    }
    unjoin(e);
    e->num_batch = 0;
}

/* Compute the batch at hand where every expert is in a slot, each under a lease meanwhile. 0, or 1: it is for the caller. */
static int compute(struct worker_end *e)
{
    const struct link *link = e->batch[0]->link;
    if (!e->shape || link->D != e->D || link->dtype != e->dtype || link->reply_dtype != e->dtype || !link->row_bytes)
        return 1;
    int64_t offset = e->batch_layer * e->E, num_leased = 0;
    for (; num_leased < e->batch_groups; num_leased++) {
        int64_t at = offset + e->experts[num_leased];
        __atomic_store_n(e->leases + at, 1, __ATOMIC_SEQ_CST);
        const void *weights = __atomic_load_n(e->weights + at, __ATOMIC_SEQ_CST);
        if (!weights) {
            __atomic_store_n(e->leases + at, 0, __ATOMIC_RELEASE);
            break;
        }
        e->chosen[num_leased] = weights;
    }
    int is_missing = num_leased < e->batch_groups, failed = 0;
    int64_t began = now_ns(), ended = began;
    if (!is_missing) {
        failed = grow(&e->out, &e->out_capacity, e->batch_rows * link->reply_row_bytes) ||
                 collegium_serve(e->shape, e->batch_x, e->batch_rows, e->pair_rows, e->pair_weights, e->batch_pairs,
                                 e->counts, e->chosen, e->batch_groups, e->out, e->num_threads);
        ended = now_ns();
    }
    while (num_leased--)
        __atomic_store_n(e->leases + offset + e->experts[num_leased], 0, __ATOMIC_RELEASE);
    if (is_missing)
        return 1;
    if (failed) {
        static const char why[] = "the worker has no memory for this batch";
        fail_batch(e, STATUS_FAILED, why, sizeof why - 1);
        return 0;
    }
    if (e->notes_visits)
        note_visit(e, began);
    e->totals[T_HITS] += e->batch_groups;
    e->totals[T_WHOLE] += e->num_batch;
    answer_batch(e, e->out, NULL, 0, began, ended);
    return 0;
}

/* Choose the first layer whose turn it is and that waits for nobody; -1 where there is none, and soonest says until when it waits. */
static int64_t choose(struct worker_end *e, int is_waiting, int64_t now, int64_t *soonest)
{
    for (int64_t i = 0; i < e->num_held; i++) {
        int64_t layer = e->held[i]->layer, num = 0;
        int is_first = e->held[i]->state == HELD;
        for (int64_t j = 0; j < i && is_first; j++)
            is_first = e->held[j]->state != HELD || e->held[j]->layer != layer;
        if (!is_first)
            continue;
        if (!is_waiting || e->num_links < 2)
            return layer;
        for (const struct link *link = e->links; link; link = link->next) {
            if (link->is_gone)
                continue;
            int64_t *met = e->met + 4 * num++;
            met[0] = link->last_layer;
            met[1] = link->last_ns;
            met[2] = link->layer_ns;
            met[3] = 0;
            for (int64_t j = 0; j < e->num_held; j++)
                met[3] |= e->held[j]->link == link && e->held[j]->layer == layer && e->held[j]->state == HELD;
        }
        int64_t until = collegium_join_until(e->met, num, e->L, layer, e->held[i]->received_ns);
        if (until <= now)
            return layer;
        *soonest = until < *soonest ? until : *soonest;
    }
    return -1;
}

static int is_alike(const struct link *a, const struct link *b)
{
    return a->D == b->D && a->dtype == b->dtype && a->reply_dtype == b->reply_dtype && a->flags == b->flags;
}

/* Take a layer's dispatches into the batch, in their turn, up to so many rows together; the first always. */
static void gather(struct worker_end *e, int64_t layer, int64_t now)
{
    int64_t kept = 0, rows = 0, num_held = e->num_held;
    e->num_batch = 0;
    struct slot *expired = NULL;
    for (int64_t i = 0; i < num_held; i++) {
        struct slot *slot = e->held[i];
        int fits = slot->state == HELD && slot->layer == layer;
        if (fits && slot->deadline_us < now / 1000) {
            slot->next_owed = expired;
            expired = slot;
            continue;
        }
        if (fits && e->num_batch)
            fits = !slot->is_alone && !e->batch[0]->is_alone && rows + slot->rows <= MOST_JOINED_ROWS &&
                   is_alike(slot->link, e->batch[0]->link);
        if (!fits) {
            e->held[kept++] = slot;
            continue;
        }
        slot->state = TAKEN;
        if (slot->turn - cost_of(slot) > e->turn)
            e->turn = slot->turn - cost_of(slot);
        rows += slot->rows;
        e->batch[e->num_batch++] = slot;
    }
    e->num_held = kept;
    while (expired) {
        struct slot *slot = expired;
        expired = slot->next_owed;
        expire(e, slot, now / 1000);
    }
}

static int is_full(const struct worker_end *e)
{
    return (e->notes_visits && e->num_visits + 4 + 2 * e->E > MAX_VISIT_WORDS) || e->num_log > MAX_LOG_WORDS / 2 ||
           e->num_spans > MAX_SPANS / 2;
}

/* --- what the caller uses --- */

void collegium_end_free(struct worker_end *e)
{
    for (int64_t i = 0; i < e->num_batch; i++)
        e->batch[i]->state = HELD;
    while (e->links) {
        struct link *link = e->links;
        for (struct slot *slot = link->slots; slot < link->slots + link->num_slots; slot++)
            slot->state = FREE;
        link->is_gone = 1;
        link->is_parked = 0;
        free_if_gone(e, link);
    }
    for (int64_t i = 0; i < e->num_hints; i++)
        free(e->hints[i].experts);
    if (e->epoll_fd >= 0)
        close(e->epoll_fd);
    void *const all[] = {e->held, e->batch, e->num_experts, e->of_decode, e->at, e->counts, e->experts, e->seen, e->chosen,
                         e->visits, e->log, e->met, e->spans, e->x, e->out, e->pair_rows, e->pair_weights, e->told};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(e);
}

/* Make an end that computes nothing yet; NULL where there is no memory or no descriptor. budget: bytes that dispatches of all
 * links may take together. frame_ns, reader_ns: how long a frame may take to come, and a reply may wait for its reader.
 * totals [NUM_TOTALS]: the caller's, counted up. */
struct worker_end *collegium_end_new(int control_fd, int64_t budget, int64_t frame_ns, int64_t reader_ns, int64_t *totals)
{
    struct worker_end *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    e->budget = budget;
    e->frame_ns = frame_ns;
    e->reader_ns = reader_ns;
    e->totals = totals;
    e->E = MAX_EXPERTS;
    e->keeps_hints = 1;
    e->of_decode = calloc(MAX_EXPERTS, sizeof *e->of_decode);
    e->at = calloc(MAX_EXPERTS, sizeof *e->at);
    e->counts = calloc(MAX_EXPERTS, sizeof *e->counts);
    e->experts = calloc(MAX_EXPERTS, sizeof *e->experts);
    e->seen = calloc(MAX_EXPERTS, sizeof *e->seen);
    e->chosen = calloc(MAX_EXPERTS, sizeof *e->chosen);
    e->visits = malloc(MAX_VISIT_WORDS * sizeof *e->visits);
    e->log = malloc(MAX_LOG_WORDS * sizeof *e->log);
    e->spans = malloc(MAX_SPANS * sizeof *e->spans);
    struct epoll_event event = {.events = EPOLLIN};
    if (e->epoll_fd < 0 || !e->of_decode || !e->at || !e->counts || !e->experts || !e->seen || !e->chosen || !e->visits ||
        !e->log || !e->spans || (control_fd >= 0 && epoll_ctl(e->epoll_fd, EPOLL_CTL_ADD, control_fd, &event))) {
        collegium_end_free(e);
        return NULL;
    }
    return e;
}

/* Say what experts there are, and, where shape is not NULL, that they are computed here. weights, leases [L, E]: as above, the
 * caller's; num_experts [L] is copied. -1: there is no memory. */
int collegium_end_serve(struct worker_end *e, const void *shape, const void *const *weights, uint8_t *leases,
                        const int64_t *num_experts, int64_t L, int64_t E, int64_t D, int dtype, int num_threads,
                        int notes_visits)
{
    int64_t *copy = malloc((size_t)L * sizeof *copy);
    if (!copy || E > MAX_EXPERTS / 4)
        return free(copy), -1;
    memcpy(copy, num_experts, (size_t)L * sizeof *copy);
    free(e->num_experts);
    e->num_experts = copy;
    e->shape = shape;
    e->weights = weights;
    e->leases = leases;
    e->L = L;
    e->E = E;
    e->D = D;
    e->dtype = (uint8_t)dtype;
    e->num_threads = num_threads;
    e->notes_visits = notes_visits;
    return 0;
}

/* Take over a connected socket, not its closing. agreed: D, bytes of an item of rows and of replies, the codes of both, most
 * rows, pairs, groups, credits, whether rows travel apart. stats [9]: the caller's, for as long as the link is here. NULL:
 * there is no memory. */
struct link *collegium_end_add(struct worker_end *e, int fd, int64_t id, const int64_t *agreed, int64_t sent_us,
                               int64_t received_us, int64_t *stats)
{
    struct link *link = calloc(1, sizeof *link);
    struct slot *slots = calloc((size_t)agreed[8], sizeof *slots);
    int64_t most = e->most_held + agreed[8], num = e->num_links + 1;
    int64_t capacity = most > e->held_capacity ? most : e->held_capacity; /* never less: a batch may be at hand */
    struct slot **held = realloc(e->held, (size_t)capacity * sizeof *held);
    if (held)
        e->held = held;
    struct slot **batch = realloc(e->batch, (size_t)capacity * sizeof *batch);
    if (batch)
        e->batch = batch;
    if (held && batch)
        e->held_capacity = capacity;
    int64_t *met = realloc(e->met, (size_t)num * 4 * sizeof *met);
    if (met)
        e->met = met;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = link};
    if (!link || !slots || !held || !batch || !met || epoll_ctl(e->epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
        free(link);
        free(slots);
        return NULL;
    }
    int is_apart = agreed[9] != 0;
    *link = (struct link){.next = e->links, .id = id, .fd = fd, .events = EPOLLIN, .D = agreed[0],
                          .dtype = (uint8_t)agreed[3], .reply_dtype = (uint8_t)agreed[4],
                          .max_rows = agreed[5], .max_pairs = agreed[6], .max_groups = agreed[7], .num_slots = agreed[8],
                          .flags = (uint8_t)is_apart, .row_bytes = is_apart ? 0 : agreed[0] * agreed[1],
                          .reply_row_bytes = is_apart ? 0 : agreed[0] * agreed[2], .slots = slots, .moved_ns = now_ns(),
                          .offset_us = plus(received_us, -(uint64_t)sent_us), .updated_us = received_us, .last_layer = -1,
                          .stats = stats};
    for (int64_t i = 0; i < agreed[8]; i++)
        slots[i].link = link;
    e->links = link;
    e->num_links = num;
    e->most_held = most;
    return link;
}

/* Forget a link; its descriptor is the caller's to close, its stats are not written again. */
void collegium_end_remove(struct worker_end *e, struct link *link)
{
    if (!link->reason)
        epoll_ctl(e->epoll_fd, EPOLL_CTL_DEL, link->fd, NULL);
    if (link->is_parked) {
        link->is_parked = 0;
        e->num_parked--;
    }
    link->is_gone = 1;
    link->fd = -1;
    link->stats = e->unheard;
    empty_link(e, link);
    e->num_links--;
    free_if_gone(e, link);
}

/* Send a small frame before any reply, at once or when the peer reads. */
void collegium_end_post(struct worker_end *e, struct link *link, const uint8_t *frame, int64_t bytes)
{
    if (!link->first_owed)
        post(e, link, frame, bytes);
}

/* Send a small frame where it can go out whole and at once, or not at all: what a link ends with. */
void collegium_end_say(struct link *link, const uint8_t *frame, int64_t bytes)
{
    if (!link->first_owed && link->notice_begin == link->notice_end && link->reason != CLOSED_BY_PEER &&
        link->reason != BROKE)
        (void)!send(link->fd, frame, (size_t)bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Tell the routers of the batch at hand that it is slow and not lost. */
void collegium_end_progress(struct worker_end *e)
{
    uint8_t head[HEADER_BYTES] = {0};
    put(head + AT_MAGIC, MAGIC, 2);
    head[AT_VERSION] = VERSION;
    head[AT_KIND] = PROGRESS;
    put(head + AT_SENT_US, (uint64_t)(now_ns() / 1000), 8);
    for (int64_t i = 0; i < e->num_batch; i++) {
        struct link *link = e->batch[i]->link;
        int is_told = link->is_gone || link->reason || link->first_owed || link->notice_begin < link->notice_end;
        for (int64_t j = 0; j < i; j++)
            is_told |= e->batch[j]->link == link;
        if (is_told)
            continue;
        link->stats[BYTES_BACK] += HEADER_BYTES;
        post(e, link, head, HEADER_BYTES);
    }
}

/* Move bytes, waiting so long at most for anything to do; compute nothing. Returns what there is to see to. */
int collegium_end_move(struct worker_end *e, int64_t wait_ns)
{
    if (!e->flags)
        move(e, wait_ns);
    int flags = e->flags;
    e->flags = 0;
    return flags;
}

/* Read, compute and answer until a time, or until there is something for the caller. With BATCH, a batch is at hand, which is
 * to be answered, failed or split before the next call. is_waiting: hold rows back for those of other routers. */
int collegium_end_run(struct worker_end *e, int64_t until_ns, int is_waiting)
{
    if (e->num_batch)
        return BATCH;
    int64_t wait = 0;
    for (int is_first = 1, num_done = 0;; is_first = 0) {
        int64_t before = now_ns(), was_held = e->num_held;
        if (!e->flags)
            move(e, wait);
        int64_t now = now_ns(), soonest = until_ns;
        if (was_held && wait > 0)
            e->totals[T_JOIN_WAIT_NS] += now - before;
        int64_t layer = is_full(e) ? -1 : choose(e, is_waiting, now, &soonest);
        /* the caller is called for at once, but not again and again before dispatches that wait: whoever sends hints without
         * end, or knocks, must not keep others waiting */
        if (is_full(e) || (e->flags && (layer < 0 || num_done || !e->owes_batch))) {
            int flags = e->flags | (is_full(e) ? FULL : 0);
            e->owes_batch = layer >= 0 && !num_done;
            e->flags = 0;
            return flags;
        }
        if (now >= until_ns && !is_first)
            return 0;
        wait = soonest - now;
        if (layer < 0)
            continue;
        wait = 0;
        gather(e, layer, now);
        if (!e->num_batch)
            continue;
        e->owes_batch = 0;
        num_done++;
        if (join(e)) {
            static const char why[] = "the worker has no memory to join this batch in";
            e->batch_groups = 0;
            fail_batch(e, STATUS_FAILED, why, sizeof why - 1);
        } else if (compute(e)) {
            int flags = e->flags | BATCH;
            e->flags = 0;
            return flags;
        }
        if (!e->num_held && !e->flags)
            wait = until_ns - now_ns();
    }
}

/* The batch at hand. out [13]: dispatches, layer, rows, pairs, groups, decoding rows, when its oldest came, then where rows
 * [R, D], experts [G], counts [G], decode counts [G], pair rows [P] (int64) and pair weights [P] (float) lie. */
void collegium_end_batch(const struct worker_end *e, int64_t *out)
{
    const int64_t values[] = {e->num_batch, e->batch_layer, e->batch_rows, e->batch_pairs, e->batch_groups, e->batch_decode,
                              e->num_batch ? e->batch[0]->received_ns : 0, (int64_t)(intptr_t)e->batch_x,
                              (int64_t)(intptr_t)e->experts, (int64_t)(intptr_t)e->counts, (int64_t)(intptr_t)e->of_decode,
                              (int64_t)(intptr_t)e->pair_rows, (int64_t)(intptr_t)e->pair_weights};
    memcpy(out, values, sizeof values);
}

/* Answer the batch at hand with rows y [R, D] of the links' reply type. missed: experts that had to be loaded for it. */
void collegium_end_answer(struct worker_end *e, const uint8_t *y, const uint16_t *missed, int64_t num_missed,
                          int64_t began_ns, int64_t ended_ns)
{
    answer_batch(e, y, missed, num_missed, began_ns, ended_ns);
}

void collegium_end_fail(struct worker_end *e, int status, const char *text, int64_t text_bytes)
{
    fail_batch(e, (enum status)status, text, text_bytes);
}

/* Give the batch at hand back; each of its dispatches will be one by itself. */
void collegium_end_split(struct worker_end *e)
{
    memmove(e->held + e->num_batch, e->held, (size_t)e->num_held * sizeof *e->held);
    int64_t num = 0;
    for (int64_t i = 0; i < e->num_batch; i++) {
        struct slot *slot = e->batch[i];
        if (slot->link->is_gone) {
            release(e, slot);
            free_if_gone(e, slot->link);
            continue;
        }
        slot->state = HELD;
        slot->is_alone = 1;
        e->held[num++] = slot;
    }
    memmove(e->held + num, e->held + e->num_batch, (size_t)e->num_held * sizeof *e->held);
    e->num_held += num;
    unjoin(e);
    e->num_batch = 0;
}

/* Take the first dispatch that waits into the caller's hands, who answers it by `reply`; with only_odd, one that cannot be
 * served as it is. NULL: there is none. out [21]: as told below. */
struct slot *collegium_end_take(struct worker_end *e, int only_odd, int64_t *out)
{
    for (int64_t i = 0; i < e->num_held; i++) {
        struct slot *s = e->held[i];
        if (only_odd && s->state != ODD)
            continue;
        const int64_t values[] = {s->link->id, (int64_t)s->seq, s->layer, s->step, (int64_t)s->epoch, s->micro_batch,
                                  s->deadline_us, s->rows, s->pairs, s->groups, s->prompts, s->text_bytes, s->received_ns,
                                  s->state == ODD, (int64_t)(intptr_t)experts_of(s), (int64_t)(intptr_t)counts_of(s),
                                  (int64_t)(intptr_t)pair_rows_of(s), (int64_t)(intptr_t)pair_weights_of(s),
                                  (int64_t)(intptr_t)s->x, (int64_t)(intptr_t)(s->body + s->body_bytes - s->text_bytes),
                                  s->link->row_bytes};
        memcpy(out, values, sizeof values);
        memmove(e->held + i, e->held + i + 1, (size_t)(e->num_held - i - 1) * sizeof *e->held);
        e->num_held--;
        s->state = TAKEN;
        return s;
    }
    return NULL;
}

/* Answer what was taken. y: rows of the link's reply type, unless status is not 0: then a text. */
void collegium_end_reply(struct worker_end *e, struct slot *slot, int status, const uint8_t *y, const uint16_t *missed,
                         int64_t num_missed, int64_t compute_us, int64_t wait_us, const char *text, int64_t text_bytes)
{
    answer(e, slot, (enum status)status, y, missed, num_missed, compute_us, wait_us, text, text_bytes);
}

/* Why a link has ended, 0 while it has not, and errno; head [64] of the frame that was being read. */
int collegium_end_reason(const struct link *link, int64_t *error, uint8_t *head)
{
    *error = link->error;
    memcpy(head, link->head, HEADER_BYTES);
    return (int)link->reason;
}

/* The body of a hint that made no sense: its bytes, and where it lies. */
int64_t collegium_end_hint_body(const struct link *link, const uint8_t **body)
{
    *body = link->hint;
    return 4 * (int64_t)get(link->head + AT_GROUPS, 2);
}

/* The oldest hint that was not told. out [4]: link, layer, groups, where experts and then counts lie, until the next call. */
int collegium_end_hint(struct worker_end *e, int64_t *out)
{
    free(e->told);
    e->told = NULL;
    if (!e->num_hints)
        return 0;
    struct hint hint = e->hints[0];
    e->num_hints--;
    memmove(e->hints, e->hints + 1, (size_t)e->num_hints * sizeof *e->hints);
    e->told = hint.experts;
    const int64_t values[] = {hint.link_id, hint.layer, hint.groups, (int64_t)(intptr_t)hint.experts};
    memcpy(out, values, sizeof values);
    return 1;
}

void collegium_end_keep_hints(struct worker_end *e, int keeps)
{
    e->keeps_hints = keeps;
}

/* What was noted since the last `drained`. out [8]: visits, their words, log, its words, spans, their number, the bytes of
 * one, dispatches that wait. */
void collegium_end_noted(const struct worker_end *e, int64_t *out)
{
    const int64_t values[] = {(int64_t)(intptr_t)e->visits, e->num_visits,
                              (int64_t)(intptr_t)e->log, e->num_log, (int64_t)(intptr_t)e->spans, e->num_spans,
                              (int64_t)sizeof *e->spans, e->num_held + e->num_batch};
    memcpy(out, values, sizeof values);
}

void collegium_end_drained(struct worker_end *e)
{
    e->num_visits = e->num_log = e->num_spans = 0;
}

int64_t collegium_end_used(const struct worker_end *e)
{
    return e->used;
}
