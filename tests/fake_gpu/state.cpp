#include "state.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#define LOCK std::lock_guard<std::mutex> guard(fake::mutex)

namespace fake {

std::mutex mutex;
long counts[COUNT_KINDS];
std::map<std::string, long> launches;

static std::map<std::string, double> given;     // settings that a test made at run time
static std::map<char *, size_t> blocks;         // device memory by address
static std::atomic<size_t> used_here{0};
static void (*observer)(int) = nullptr;
static thread_local int device = 0, error = SUCCESS;

// Parts of the device memory whose content is known: it came from the host and no kernel has run
// since. Everything else reads as zeros, since kernels do nothing.
static std::map<char *, size_t> known;
static const size_t LARGEST_KNOWN = 1 << 16;    // larger copies are counted, not made

double setting(const char *name, double otherwise) {
    {
        LOCK;
        auto found = given.find(name);
        if (found != given.end()) return found->second;
    }
    const char *text = getenv((std::string("FAKE_GPU_") + name).c_str());
    return text && *text ? atof(text) : otherwise;
}

int device_count() { return (int)setting("COUNT", 1); }
int capability() { return (int)setting("CAPABILITY", 90); }
size_t total_bytes() { return (size_t)(setting("MEMORY_GB", 80) * (1 << 30)); }

// Bytes in use of the card: by all processes that name the same file in FAKE_GPU_CARD, or by this.
static std::atomic<size_t> &used() {
    static std::atomic<size_t> *shared = [] {
        const char *path = getenv("FAKE_GPU_CARD");
        int file = path && *path ? open(path, O_RDWR | O_CREAT, 0600) : -1;
        if (file < 0 || ftruncate(file, sizeof(size_t))) return &used_here;
        void *page = mmap(nullptr, sizeof(size_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        return page == MAP_FAILED ? &used_here : (std::atomic<size_t> *)page;
    }();
    return *shared;
}

size_t free_bytes() {
    size_t taken = used() + (size_t)(setting("HELD_GB", 0) * (1 << 30)), total = total_bytes();
    return total > taken ? total - taken : 0;
}

int current_device_of_thread() { return device; }
void set_current_device_of_thread(int number) { device = number; }

void add(Count kind, long by) {
    LOCK;
    counts[kind] += by;
}

void note_sync(Sync kind) {
    add(SYNCS);
    if (observer) observer(kind);
}

int note_launch(Count kind, const std::string &name) {
    if (capability() < 75) return fail(NO_KERNEL_IMAGE);  // the stock wheel has none
    LOCK;
    counts[kind]++;
    launches[name]++;
    known.clear();
    return SUCCESS;
}

int fail(int code) { return error = code; }

int take_error(bool clear) {
    int code = error;
    if (clear) error = SUCCESS;
    return code;
}

bool take_bytes(size_t bytes) {
    if (free_bytes() < bytes) return false;
    used() += bytes;
    LOCK;
    counts[ALLOCATIONS]++;
    return true;
}

void give_bytes(size_t bytes) { used() -= bytes; }

void add_block(void *begin, size_t bytes) {
    LOCK;
    blocks[(char *)begin] = bytes;
}

size_t remove_block(void *begin) {
    LOCK;
    auto found = blocks.find((char *)begin);
    if (found == blocks.end()) return 0;
    size_t bytes = found->second;
    blocks.erase(found);
    return bytes;
}

// The entry that holds the address, or the end. The lock must be held.
static std::map<char *, size_t>::iterator find(std::map<char *, size_t> &ranges, const void *at) {
    auto next = ranges.upper_bound((char *)at);
    if (next == ranges.begin()) return ranges.end();
    --next;
    return (char *)at < next->first + next->second ? next : ranges.end();
}

bool is_on_card(const void *address) {
    LOCK;
    return find(blocks, address) != blocks.end();
}

static bool is_known(const void *begin, size_t bytes) {
    auto found = find(known, begin);
    return found != known.end() && (char *)begin + bytes <= found->first + found->second;
}

static void set_known(void *begin, size_t bytes, bool value) {
    char *end = (char *)begin + bytes;
    auto before = find(known, begin);
    if (before != known.end()) known.erase(before);
    auto next = known.lower_bound((char *)begin);
    while (next != known.end() && next->first < end) next = known.erase(next);
    if (value) known[(char *)begin] = bytes;
}

void copy(void *to, const void *from, size_t bytes) {
    bool into = is_on_card(to), out_of = is_on_card(from);
    LOCK;
    if (into) {
        bool knows = bytes <= LARGEST_KNOWN && (!out_of || is_known(from, bytes));
        counts[out_of ? WITHIN : TO_DEVICE]++;
        counts[out_of ? WITHIN_BYTES : TO_DEVICE_BYTES] += bytes;
        if (knows) memmove(to, from, bytes);
        set_known(to, bytes, knows);
    } else if (out_of) {
        counts[TO_HOST]++;
        counts[TO_HOST_BYTES] += bytes;
        if (is_known(from, bytes)) memcpy(to, from, bytes);
        else memset(to, 0, bytes);
    } else {
        memcpy(to, from, bytes);
    }
}

void forget_contents() {
    LOCK;
    known.clear();
}

void forget(void *begin, size_t bytes) {
    LOCK;
    set_known(begin, bytes, false);
}

}  // namespace fake

// ------------------------------------------------------------------ what tests ask, see inside.py

EXPORT void fake_gpu_observe(void (*function)(int)) { fake::observer = function; }

EXPORT void fake_gpu_set(const char *name, double value) {
    LOCK;
    fake::given[name] = value;
}

EXPORT long fake_gpu_count(int kind) {
    LOCK;
    return fake::counts[kind];
}

// Names and numbers of all launches so far, one a line; the buffer stays valid until the next call.
EXPORT const char *fake_gpu_launches() {
    static std::string text;
    LOCK;
    text.clear();
    for (auto &launch : fake::launches)
        text += std::to_string(launch.second) + "\t" + launch.first + "\n";
    return text.c_str();
}
