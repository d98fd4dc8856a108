/* The wire format of links, as collegium/link/frame.py and header.py have it: the only place in C with offsets of it.
 *
 * A frame is a header of 64 bytes and its body, little endian. Dispatch: experts u16 [G], counts u16 [G], pair rows u32 [P],
 * pair weights f32 [P], rows [R, D], a traceparent. Reply: rows [R, D], missed u16 [M]; or a message. Hint: experts u16 [G],
 * counts u16 [G]. */

#ifndef COLLEGIUM_FRAME_H
#define COLLEGIUM_FRAME_H

#include <stdint.h>
#include <time.h>

#define HEADER_BYTES 64
#define MAGIC 0xC011
#define VERSION 2
#define MAX_TEXT_BYTES 1024

#define NO_HINTS 2 /* of the flags of a reply */

enum kind { DISPATCH = 3, REPLY = 4, PROGRESS = 5, HINT = 7 };
enum status { STATUS_OK, STATUS_FAILED, STATUS_EXPIRED, STATUS_BAD_FRAME };

/* of every frame */
#define AT_MAGIC 0       /* u16 */
#define AT_VERSION 2     /* u8 */
#define AT_KIND 3        /* u8 */
#define AT_STATUS 4      /* u8 */
#define AT_DTYPE 5       /* u8 */
#define AT_MICRO_BATCH 6 /* u8 */
#define AT_FLAGS 7       /* u8: bit 0 the rows travel apart; of a reply, bit 1: hints are of no use to this worker now */
#define AT_SEQ 8         /* u64 */
#define AT_BODY 16       /* u32, bytes */
#define AT_TEXT 20       /* u16, bytes */
#define AT_LAYER 22      /* u16 */
#define AT_SENT_US 56    /* u64, the sender's clock */
/* of a dispatch; groups of a hint too */
#define AT_DEADLINE_US 24 /* u64, the sender's clock */
#define AT_EPOCH 32       /* u64 */
#define AT_STEP 40        /* u32 */
#define AT_ROWS 44        /* u32 */
#define AT_PAIRS 48       /* u32 */
#define AT_GROUPS 52      /* u16 */
#define AT_PROMPTS 54     /* u16, rows */
/* of a reply */
#define AT_COMPUTE_US 24 /* u32 */
#define AT_WAIT_US 28    /* u32 */
#define AT_MISSES 32     /* u32 */
#define AT_REPLY_ROWS 36 /* u32 */

static inline void put(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

static inline uint64_t get(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static inline int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
