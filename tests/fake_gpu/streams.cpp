// Streams and events. Nothing runs, so nothing waits; but who would wait for whom is kept: which
// launches of each stream are over before the next one of another stream may begin. Waits of the
// host do not count, so that an order which rests on an accidental one is seen.
#include <cstdlib>

#include "state.h"

using namespace fake;

using Reach = std::map<void *, long>;             // launches of each stream that are over
static std::map<void *, Reach> reached;           // before the next launch of a stream
static std::map<void *, Reach> recorded;          // where an event stands

static void join(Reach &reach, const Reach &other) {
    for (auto &entry : other)
        if (reach[entry.first] < entry.second) reach[entry.first] = entry.second;
}

void fake::note_order(void *stream) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    reached[stream][stream]++;
}

// Launches on one stream that the next launch on another would not wait for.
EXPORT long fake_gpu_unordered(void *earlier, void *later) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    return reached[earlier][earlier] - reached[later][earlier];
}

EXPORT int cudaStreamCreate(void **stream) { *stream = malloc(8); return 0; }
EXPORT int cudaStreamCreateWithFlags(void **stream, unsigned) { return cudaStreamCreate(stream); }
EXPORT int cudaStreamCreateWithPriority(void **stream, unsigned, int) {
    return cudaStreamCreate(stream);
}
EXPORT int cudaStreamDestroy(void *) { return 0; }
EXPORT int cudaStreamGetPriority(void *, int *priority) { *priority = 0; return 0; }
EXPORT int cudaStreamIsCapturing(void *, int *status) { *status = 0; return 0; }
EXPORT int cudaStreamGetCaptureInfo(void *, int *status, unsigned long long *id, void **,
                                    const void ***, const void **, size_t *count) {
    *status = 0;
    if (id) *id = 0;
    if (count) *count = 0;
    return 0;
}
EXPORT int cudaStreamQuery(void *) { return 0; }
EXPORT int cudaStreamSynchronize(void *) { note_sync(STREAM); return 0; }
EXPORT int cudaStreamWaitEvent(void *stream, void *event, unsigned) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    join(reached[stream], recorded[event]);
    return 0;
}
EXPORT int cudaStreamAddCallback(void *, void *, void *, unsigned) { return 0; }
EXPORT int cudaThreadExchangeStreamCaptureMode(int *) { return 0; }
EXPORT int cudaEventCreate(void **event) { *event = malloc(8); return 0; }
EXPORT int cudaEventCreateWithFlags(void **event, unsigned) { return cudaEventCreate(event); }
EXPORT int cudaEventDestroy(void *event) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    recorded.erase(event);
    free(event);
    return 0;
}
EXPORT int cudaEventElapsedTime(float *ms, void *, void *) { *ms = 1.0f; return 0; }
EXPORT int cudaEventQuery(void *) { return 0; }
EXPORT int cudaEventRecord(void *event, void *stream) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    recorded[event] = reached[stream];
    return 0;
}
EXPORT int cudaEventRecordWithFlags(void *event, void *stream, unsigned) {
    return cudaEventRecord(event, stream);
}
EXPORT int cudaEventSynchronize(void *) { note_sync(EVENT); return 0; }
EXPORT int cudaProfilerStart() { return 0; }
EXPORT int cudaProfilerStop() { return 0; }
