// The driver: contexts and modules are empty, launches of compiled kernels are counted, and memory
// can be reserved, created and mapped piece by piece, as expandable segments need it.
#include <cuda.h>
#include <sys/mman.h>

#include "state.h"

using namespace fake;

#undef cuLinkAddData
#undef cuLinkCreate
#define IGNORES(name) EXPORT int fake_##name(...) __asm__(#name); EXPORT int fake_##name(...) { return 0; }

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = (int)setting("DRIVER", 13000);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *count) { *count = device_count(); return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch ((int)attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error";
    return CUDA_SUCCESS;
}

static int anything;
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device_of_thread();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)&anything;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCtx(CUstream, CUcontext *context) { return cuCtxGetCurrent(context); }
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *) {
    *module = (CUmodule)&anything;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *) { return cuModuleLoad(module, ""); }
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *, void **) {
    return cuModuleLoad(module, "");
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *) {
    *function = (CUfunction)&anything;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute, CUfunction) {
    *value = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction, const CUlaunchConfig *) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned,
                               unsigned, unsigned, CUstream, void **, void **) {
    return (CUresult)note_launch(COMPILED, "compiled");
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction, void **, void **) {
    return (CUresult)note_launch(COMPILED, "compiled");
}
IGNORES(cuCtxSetCurrent) IGNORES(cuCtxSetLimit) IGNORES(cuCtxGetLimit)
IGNORES(cuDevicePrimaryCtxRetain) IGNORES(cuFuncSetAttribute) IGNORES(cuFuncSetCacheConfig)
IGNORES(cuLaunchCooperativeKernel) IGNORES(cuLinkAddData_v2) IGNORES(cuLinkComplete)
IGNORES(cuLinkCreate_v2) IGNORES(cuModuleUnload) IGNORES(cuPointerGetAttribute)
IGNORES(cuOccupancyMaxActiveBlocksPerMultiprocessor) IGNORES(cuTensorMapEncodeTiled)
IGNORES(cuTensorMapEncodeIm2col) IGNORES(cuMemsetD32Async) IGNORES(cuStreamWriteValue32_v2)
IGNORES(cuStreamWriteValue32) IGNORES(cuMemExportToShareableHandle)
IGNORES(cuMemImportFromShareableHandle) IGNORES(cuMemRetainAllocationHandle)
IGNORES(cuMemGetAllocationPropertiesFromHandle) IGNORES(cuMemGetAddressRange_v2)
IGNORES(cuMemGetAddressRange)

// NVML, which the allocator asks about the fabric between cards
enum { NVML_NOT_SUPPORTED = 3 };
IGNORES(nvmlInit_v2)
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **device) {
    *device = &anything;
    return 0;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *count, void *) {
    *count = 0;
    return 0;
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = (int)setting("DRIVER", 13000);
    return 0;
}
EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(...) { return NVML_NOT_SUPPORTED; }
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(...) { return NVML_NOT_SUPPORTED; }
IGNORES(nvmlDeviceGetGpuFabricInfoV)  // state 0: there is no fabric

// ------------------------------------------------------------------- memory that grows in place

struct Piece { size_t bytes; int owners; };  // memory of the card, wherever it is mapped
static std::map<char *, Piece *> mapped;

static void let_go(Piece *piece) {
    if (--piece->owners == 0) give_bytes(piece->bytes), delete piece;
}
EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *,
                                              CUmemAllocationGranularity_flags) {
    *bytes = 1 << 21;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t, CUdeviceptr,
                                    unsigned long long) {
    void *space = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = (CUdeviceptr)space;
    return space == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    munmap((void *)address, bytes);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
                            const CUmemAllocationProp *, unsigned long long) {
    if (!take_bytes(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = (CUmemGenericAllocationHandle) new Piece{bytes, 1};
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t, CUmemGenericAllocationHandle handle,
                         unsigned long long) {
    Piece *piece = (Piece *)handle;
    add_block((void *)address, bytes);
    std::lock_guard<std::mutex> guard(fake::mutex);
    mapped[(char *)address] = piece;
    piece->owners++;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *, size_t) {
    mprotect((void *)address, bytes, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    for (char *at = (char *)address; at < (char *)address + bytes;) {
        size_t length = remove_block(at);
        if (!length) break;
        Piece *piece;
        {
            std::lock_guard<std::mutex> guard(fake::mutex);
            piece = mapped[at];
            mapped.erase(at);
        }
        let_go(piece);
        at += length;
    }
    madvise((void *)address, bytes, MADV_DONTNEED);
    mprotect((void *)address, bytes, PROT_NONE);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    let_go((Piece *)handle);
    return CUDA_SUCCESS;
}
