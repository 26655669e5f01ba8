// cuBLAS, cuBLASLt and NCCL: products and collectives are counted. What a collective leaves in
// its buffers is what was there, as if all ranks held the same and sums were not made.
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace fake;

static int multiply() {
    add(PRODUCTS);
    forget_contents();
    return 0;
}
static int make_handle(void **handle) { *handle = calloc(1, 8192); return 0; }

#define CREATES(name) EXPORT int name(void **handle, ...) { return make_handle(handle); }
#define IGNORES(name) EXPORT int name(...) { return 0; }
#define MULTIPLIES(name) EXPORT int name(...) { return multiply(); }
#define MEETS(name) EXPORT int name(...) { add(COLLECTIVES); return 0; }

CREATES(cublasCreate_v2) CREATES(cublasLtCreate) CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatmulPreferenceCreate) CREATES(cublasLtMatrixLayoutCreate)
EXPORT int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
EXPORT int cublasGetPointerMode_v2(void *, int *mode) { *mode = 0; return 0; }
EXPORT size_t cublasLtGetVersion() { return 130101; }
struct Heuristic { char algorithm[64]; size_t workspace; int state; float waves; int reserved[4]; };
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *,
                                          int, Heuristic *result, int *found) {
    memset(result, 0, sizeof *result);
    *found = 1;
    return 0;
}
MULTIPLIES(cublasLtMatmul) MULTIPLIES(cublasGemmEx) MULTIPLIES(cublasGemmStridedBatchedEx)
MULTIPLIES(cublasSgemm_v2) MULTIPLIES(cublasSgemmStridedBatched) MULTIPLIES(cublasSgemmEx)
MULTIPLIES(cublasDgemm_v2) MULTIPLIES(cublasDgemmStridedBatched) MULTIPLIES(cublasSgemv_v2)
MULTIPLIES(cublasDgemv_v2) MULTIPLIES(cublasSdot_v2) MULTIPLIES(cublasDdot_v2)
MULTIPLIES(cublasDotEx)
IGNORES(cublasDestroy_v2) IGNORES(cublasSetStream_v2) IGNORES(cublasSetWorkspace_v2)
IGNORES(cublasSetMathMode) IGNORES(cublasSetPointerMode_v2) IGNORES(cublasSetSmCountTarget)
IGNORES(cublasLtMatmulDescDestroy) IGNORES(cublasLtMatmulDescSetAttribute)
IGNORES(cublasLtMatmulPreferenceDestroy) IGNORES(cublasLtMatmulPreferenceSetAttribute)
IGNORES(cublasLtMatrixLayoutDestroy) IGNORES(cublasLtMatrixLayoutSetAttribute)
IGNORES(cublasLtMatmulAlgoCheck) IGNORES(cublasLtMatmulAlgoInit)
IGNORES(cublasLtMatmulAlgoConfigSetAttribute) IGNORES(cublasLtMatmulAlgoConfigGetAttribute)

EXPORT int ncclGetVersion(int *version) { *version = 23007; return 0; }
EXPORT int ncclGetUniqueId(void *id) { memset(id, 1, 128); return 0; }
EXPORT const char *ncclGetErrorString(int) { return "no error"; }
EXPORT const char *ncclGetLastError(void *) { return ""; }
CREATES(ncclCommInitRank) CREATES(ncclCommInitRankConfig) CREATES(ncclCommInitRankScalable)
EXPORT int ncclCommSplit(void *, int, int, void **handle, void *) { return make_handle(handle); }
EXPORT int ncclCommGetAsyncError(void *, int *code) { *code = 0; return 0; }
EXPORT int ncclCommCount(void *, int *count) { *count = 1; return 0; }
EXPORT int ncclCommUserRank(void *, int *rank) { *rank = 0; return 0; }
MEETS(ncclAllReduce) MEETS(ncclAllGather) MEETS(ncclBroadcast) MEETS(ncclBcast)
MEETS(ncclReduceScatter) MEETS(ncclReduce) MEETS(ncclSend) MEETS(ncclRecv)
IGNORES(ncclCommAbort) IGNORES(ncclCommDestroy) IGNORES(ncclCommFinalize) IGNORES(ncclGroupStart)
IGNORES(ncclGroupEnd) IGNORES(ncclCommRegister) IGNORES(ncclCommDeregister)
IGNORES(ncclCommWindowRegister) IGNORES(ncclCommWindowDeregister)
