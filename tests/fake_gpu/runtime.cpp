// The CUDA runtime: memory is lazily mapped host memory, streams and events are empty, kernels
// do nothing.
#include <driver_types.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace fake;

static std::unordered_map<const void *, std::string> names;  // of kernels, by their host function
static std::map<char *, size_t> pinned;

static int driver_version() { return (int)setting("DRIVER", 13000); }
static int launch(const void *kernel) {
    std::string name;
    {
        std::lock_guard<std::mutex> guard(fake::mutex);
        auto found = names.find(kernel);
        name = found == names.end() ? "?" : found->second;
    }
    return note_launch(KERNELS, name);
}

// ------------------------------------------------------------------------------------- launches

EXPORT void **__cudaRegisterFatBinary(void *) { static void *handle[4]; return handle; }
EXPORT void __cudaRegisterFatBinaryEnd(void **) {}
EXPORT void __cudaUnregisterFatBinary(void **) {}
EXPORT void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *,
                                   void *, void *, void *, int *) {
    std::lock_guard<std::mutex> guard(fake::mutex);
    names[host] = name;
}
EXPORT void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

struct Shape { dim3 grid, block; size_t shared; void *stream; };
static thread_local Shape pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
EXPORT int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return 0;
}
EXPORT int __cudaGetKernel(void **kernel, const void *host) { *kernel = (void *)host; return 0; }
EXPORT int __cudaLaunchKernel(void *kernel, dim3, dim3, void **, size_t, void *stream) {
    note_order(stream);
    return launch(kernel);
}
EXPORT int cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, void *stream) {
    note_order(stream);
    return launch(kernel);
}
EXPORT int cudaLaunchKernelExC(const void *, const void *kernel, void **) { return launch(kernel); }
EXPORT int cudaLaunchCooperativeKernel(const void *kernel, ...) { return launch(kernel); }
EXPORT int cudaLaunchHostFunc(void *, void (*function)(void *), void *data) {
    function(data);
    return 0;
}
EXPORT int cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return 0;
}
EXPORT int cudaFuncSetAttribute(const void *, int, int) { return 0; }
EXPORT int cudaKernelSetAttributeForDevice(...) { return 0; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, ...) { *blocks = 2; return 0; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, ...) {
    *blocks = 2;
    return 0;
}

// -------------------------------------------------------------------------------------- devices

EXPORT int cudaDriverGetVersion(int *version) { *version = driver_version(); return 0; }
EXPORT int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
EXPORT int cudaGetDeviceCount(int *count) {
    *count = driver_version() < 13000 ? 0 : device_count();
    return driver_version() < 13000 ? fail(OLD_DRIVER) : *count ? SUCCESS : fail(NO_DEVICE);
}
EXPORT int cudaGetDevice(int *number) { *number = current_device_of_thread(); return 0; }
EXPORT int cudaSetDevice(int number) {
    if (number < 0 || number >= device_count()) return fail(BAD_DEVICE);
    set_current_device_of_thread(number);
    return 0;
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device);
EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    return cuDeviceGetAttribute(value, attribute, device);
}
EXPORT int cudaGetDeviceProperties(cudaDeviceProp *properties, int number) {
    memset(properties, 0, sizeof *properties);
    const char *name = getenv("FAKE_GPU_NAME");
    snprintf(properties->name, sizeof properties->name, "%s", name ? name : "Fake GPU");
    properties->uuid.bytes[15] = (char)number;
    properties->totalGlobalMem = total_bytes();
    properties->major = capability() / 10, properties->minor = capability() % 10;
    properties->multiProcessorCount = 132, properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024, properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->sharedMemPerBlock = 49152, properties->sharedMemPerBlockOptin = 232448;
    properties->sharedMemPerMultiprocessor = 233472;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->l2CacheSize = 50 << 20, properties->maxBlocksPerMultiProcessor = 32;
    properties->totalConstMem = 65536, properties->textureAlignment = 512;
    properties->unifiedAddressing = properties->concurrentKernels = 1;
    properties->asyncEngineCount = 3;
    return 0;
}
EXPORT int cudaDeviceGetPCIBusId(char *text, int bytes, int number) {
    snprintf(text, bytes, "0000:%02x:00.0", number + 1);
    return 0;
}
EXPORT int cudaDeviceCanAccessPeer(int *answer, int, int) { *answer = 0; return 0; }
EXPORT int cudaDeviceEnablePeerAccess(int, unsigned) { return 0; }
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return 0;
}
EXPORT int cudaDeviceSynchronize() { note_sync(DEVICE); return 0; }

EXPORT int cudaGetLastError() { return take_error(true); }
EXPORT int cudaPeekAtLastError() { return take_error(false); }
EXPORT const char *cudaGetErrorName(int code) {
    return code == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
EXPORT const char *cudaGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case OUT_OF_MEMORY: return "out of memory";
        case OLD_DRIVER: return "CUDA driver version is insufficient for CUDA runtime version";
        case NO_DEVICE: return "no CUDA-capable device is detected";
        case BAD_DEVICE: return "invalid device ordinal";
        case NO_KERNEL_IMAGE: return "no kernel image is available for execution on the device";
    }
    return "unknown error";
}
EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                            unsigned long long, int *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

// --------------------------------------------------------------------------------------- memory

EXPORT int cudaMemGetInfo(size_t *free, size_t *total) {
    *total = total_bytes(), *free = free_bytes();
    return 0;
}
EXPORT int cudaMalloc(void **address, size_t bytes) {
    size_t whole = (bytes + (1 << 21) - 1) >> 21 << 21;
    *address = nullptr;
    if (!take_bytes(whole)) return fail(OUT_OF_MEMORY);
    void *block = mmap(nullptr, whole, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return fail(OUT_OF_MEMORY);
    add_block(block, whole);
    *address = block;
    return 0;
}
EXPORT int cudaFree(void *address) {
    size_t bytes = remove_block(address);
    if (bytes) give_bytes(bytes), munmap(address, bytes);
    return 0;
}
EXPORT int cudaMallocAsync(void **address, size_t bytes, void *) { return cudaMalloc(address, bytes); }
EXPORT int cudaFreeAsync(void *address, void *) { return cudaFree(address); }
EXPORT int cudaHostAlloc(void **address, size_t bytes, unsigned) {
    *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::lock_guard<std::mutex> guard(fake::mutex);
    pinned[(char *)*address] = bytes;
    return 0;
}
EXPORT int cudaFreeHost(void *address) {
    {
        std::lock_guard<std::mutex> guard(fake::mutex);
        pinned.erase((char *)address);
    }
    free(address);
    return 0;
}
EXPORT int cudaHostRegister(void *, size_t, unsigned) { return 0; }
EXPORT int cudaHostUnregister(void *) { return 0; }
EXPORT int cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    bool is_pinned = false;
    {
        std::lock_guard<std::mutex> guard(fake::mutex);
        auto next = pinned.upper_bound((char *)address);
        if (next != pinned.begin()) {
            --next;
            is_pinned = (char *)address < next->first + next->second;
        }
    }
    attributes->type = is_on_card(address) ? cudaMemoryTypeDevice
                       : is_pinned         ? cudaMemoryTypeHost
                                           : cudaMemoryTypeUnregistered;
    attributes->devicePointer = (void *)address;
    return 0;
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int) {
    copy(to, from, bytes);
    note_sync(COPY);
    return 0;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, void *) {
    copy(to, from, bytes);
    return 0;
}
EXPORT int cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, void *) {
    copy(to, from, bytes);
    return 0;
}
EXPORT int cudaMemcpy2DAsync(void *to, size_t pitch, const void *, size_t, size_t, size_t height, int,
                             void *) {
    add(WITHIN);
    forget(to, pitch * height);
    return 0;
}
EXPORT int cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, int) { return 0; }
EXPORT int cudaMemset(void *begin, int, size_t bytes) {
    add(SETS);
    forget(begin, bytes);
    return 0;
}
EXPORT int cudaMemsetAsync(void *begin, int value, size_t bytes, void *) {
    return cudaMemset(begin, value, bytes);
}
EXPORT int cudaGetSymbolAddress(void **address, const void *) { *address = malloc(4096); return 0; }
EXPORT int cudaDeviceGetDefaultMemPool(void **pool, int) { *pool = malloc(8); return 0; }
