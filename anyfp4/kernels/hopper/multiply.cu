// Products with the left operand in registers, in float16 if FLOAT16, else bfloat16. After async.cu.
//
// wgmma m64nTk16, T = TOKENS.
// Operands of inline assembly go by number, so the numbers are spelled out.

#define FOUR(i) "+f"(d[4 * (i)]), "+f"(d[4 * (i) + 1]), "+f"(d[4 * (i) + 2]), "+f"(d[4 * (i) + 3])
#define SUMS_8 FOUR(0)
#define SUMS_16 SUMS_8, FOUR(1)
#define SUMS_32 SUMS_16, FOUR(2), FOUR(3)
#define SUMS_64 SUMS_32, FOUR(4), FOUR(5), FOUR(6), FOUR(7)
#define SUMS_128 SUMS_64, FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)

#define NAMES_8 "%0,%1,%2,%3"
#define NAMES_16 NAMES_8 ",%4,%5,%6,%7"
#define NAMES_32 NAMES_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_64 NAMES_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_128 \
    NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
             ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define INPUTS_8 "{%4,%5,%6,%7}, %8"
#define INPUTS_16 "{%8,%9,%10,%11}, %12"
#define INPUTS_32 "{%16,%17,%18,%19}, %20"
#define INPUTS_64 "{%32,%33,%34,%35}, %36"
#define INPUTS_128 "{%64,%65,%66,%67}, %68"
#define ADD_8 "%9"
#define ADD_16 "%13"
#define ADD_32 "%21"
#define ADD_64 "%37"
#define ADD_128 "%69"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#if FLOAT16
#define TYPES ".f32.f16.f16 "
#define MMA_TYPES ".f32.f16.f16.f32 "
#else
#define TYPES ".f32.bf16.bf16 "
#define MMA_TYPES ".f32.bf16.bf16.f32 "
#endif

// d = A · B + d: A [16, 16], B [8, 16], by a warp
INLINE void multiply(float *d, const uint32 *a, const uint32 *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col" MMA_TYPES "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// four matrices of 8 rows of 16 bytes: lane 8·i + r gives the address of row r of matrix i
INLINE void load_matrices(uint32 address, uint32 *d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// d = A · B (+ d if `add`): A [64, 16], B [T, 16] in shared memory
INLINE void multiply(float (&d)[TOKENS / 2], const uint32 *a, uint64 b, int add) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " JOIN(ADD_, TOKENS) ", 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n" STRING(TOKENS) "k16" TYPES
        "{" JOIN(NAMES_, TOKENS) "}, " JOIN(INPUTS_, TOKENS) ", p, 1, 1, 0;\n\t}"
        : JOIN(SUMS_, TOKENS) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
