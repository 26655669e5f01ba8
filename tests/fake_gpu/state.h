// What the stand-ins share: settings of the card, its memory, and what is counted.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

// codes of cudaError_t; the driver's CUresult has the same numbers
enum Code { SUCCESS = 0, OUT_OF_MEMORY = 2, OLD_DRIVER = 35, NO_DEVICE = 100, BAD_DEVICE = 101,
            NO_KERNEL_IMAGE = 209, NOT_FOUND = 500 };

// in the order of `COUNTS` of inside.py
enum Count { KERNELS, COMPILED, PRODUCTS, TO_DEVICE, TO_DEVICE_BYTES, TO_HOST, TO_HOST_BYTES,
             WITHIN, WITHIN_BYTES, SETS, SYNCS, COLLECTIVES, ALLOCATIONS, COUNT_KINDS };

// in the order of `SYNC_KINDS` of inside.py
enum Sync { STREAM, DEVICE, EVENT, COPY };

extern std::mutex mutex;              // guards all that follows
extern long counts[COUNT_KINDS];
extern std::map<std::string, long> launches;  // of each kernel
extern int current_device_of_thread();
extern void set_current_device_of_thread(int);

double setting(const char *name, double otherwise);  // FAKE_GPU_<name>, or what a test set since
int device_count();
int capability();                     // 90 for 9.0
size_t total_bytes();
size_t free_bytes();
void add(Count kind, long by = 1);
void note_sync(Sync kind);            // calls the observer
int note_launch(Count kind, const std::string &name);  // counts it, or says why it cannot be
void note_order(void *stream);        // a launch on a stream, see streams.cpp
int fail(int code);                   // remembers the code for cudaGetLastError
int take_error(bool clear);

// memory
bool take_bytes(size_t bytes);        // false where the card is full
void give_bytes(size_t bytes);
void add_block(void *begin, size_t bytes);
size_t remove_block(void *begin);     // its size, 0 for none
bool is_on_card(const void *address);
void copy(void *to, const void *from, size_t bytes);
void forget_contents();               // after a kernel, what the card holds is unknown
void forget(void *begin, size_t bytes);

}  // namespace fake
