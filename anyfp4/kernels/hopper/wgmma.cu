// wgmma m64nTk16 with float32 accumulators, T = 16 · BLOCKS columns. A block of columns is eight registers of a thread.
// Operands of inline assembly go by number, so the numbers are spelled out here.

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define EIGHT(b) \
    "+f"(d[8 * b]), "+f"(d[8 * b + 1]), "+f"(d[8 * b + 2]), "+f"(d[8 * b + 3]), "+f"(d[8 * b + 4]), \
        "+f"(d[8 * b + 5]), "+f"(d[8 * b + 6]), "+f"(d[8 * b + 7])
#define SUMS_1 EIGHT(0)
#define SUMS_2 SUMS_1, EIGHT(1)
#define SUMS_3 SUMS_2, EIGHT(2)
#define SUMS_4 SUMS_3, EIGHT(3)
#define SUMS_5 SUMS_4, EIGHT(4)
#define SUMS_6 SUMS_5, EIGHT(5)
#define SUMS_7 SUMS_6, EIGHT(6)
#define SUMS_8 SUMS_7, EIGHT(7)
#define SUMS_9 SUMS_8, EIGHT(8)
#define SUMS_10 SUMS_9, EIGHT(9)
#define SUMS_11 SUMS_10, EIGHT(10)
#define SUMS_12 SUMS_11, EIGHT(11)
#define SUMS_13 SUMS_12, EIGHT(12)
#define SUMS_14 SUMS_13, EIGHT(13)
#define SUMS_15 SUMS_14, EIGHT(14)
#define SUMS_16 SUMS_15, EIGHT(15)

#define NAME_1 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAME_2 NAME_1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAME_3 NAME_2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAME_4 NAME_3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAME_5 NAME_4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAME_6 NAME_5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAME_7 NAME_6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAME_8 NAME_7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAME_9 NAME_8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define NAME_10 NAME_9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define NAME_11 NAME_10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAME_12 NAME_11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define NAME_13 NAME_12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define NAME_14 NAME_13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define NAME_15 NAME_14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define NAME_16 NAME_15 ",%120,%121,%122,%123,%124,%125,%126,%127"

// inputs after them: four registers of A and the descriptor of B, or two descriptors; last whether to add to d
#define REGISTERS_1 "{%8,%9,%10,%11}, %12"
#define REGISTERS_ADD_1 "%13"
#define REGISTERS_2 "{%16,%17,%18,%19}, %20"
#define REGISTERS_ADD_2 "%21"
#define REGISTERS_3 "{%24,%25,%26,%27}, %28"
#define REGISTERS_ADD_3 "%29"
#define REGISTERS_4 "{%32,%33,%34,%35}, %36"
#define REGISTERS_ADD_4 "%37"
#define REGISTERS_5 "{%40,%41,%42,%43}, %44"
#define REGISTERS_ADD_5 "%45"
#define REGISTERS_6 "{%48,%49,%50,%51}, %52"
#define REGISTERS_ADD_6 "%53"
#define REGISTERS_7 "{%56,%57,%58,%59}, %60"
#define REGISTERS_ADD_7 "%61"
#define REGISTERS_8 "{%64,%65,%66,%67}, %68"
#define REGISTERS_ADD_8 "%69"
#define REGISTERS_9 "{%72,%73,%74,%75}, %76"
#define REGISTERS_ADD_9 "%77"
#define REGISTERS_10 "{%80,%81,%82,%83}, %84"
#define REGISTERS_ADD_10 "%85"
#define REGISTERS_11 "{%88,%89,%90,%91}, %92"
#define REGISTERS_ADD_11 "%93"
#define REGISTERS_12 "{%96,%97,%98,%99}, %100"
#define REGISTERS_ADD_12 "%101"
#define REGISTERS_13 "{%104,%105,%106,%107}, %108"
#define REGISTERS_ADD_13 "%109"
#define REGISTERS_14 "{%112,%113,%114,%115}, %116"
#define REGISTERS_ADD_14 "%117"
#define REGISTERS_15 "{%120,%121,%122,%123}, %124"
#define REGISTERS_ADD_15 "%125"
#define REGISTERS_16 "{%128,%129,%130,%131}, %132"
#define REGISTERS_ADD_16 "%133"
#define SHARED_1 "%8, %9"
#define SHARED_ADD_1 "%10"
#define SHARED_2 "%16, %17"
#define SHARED_ADD_2 "%18"
#define SHARED_3 "%24, %25"
#define SHARED_ADD_3 "%26"
#define SHARED_4 "%32, %33"
#define SHARED_ADD_4 "%34"
#define SHARED_5 "%40, %41"
#define SHARED_ADD_5 "%42"
#define SHARED_6 "%48, %49"
#define SHARED_ADD_6 "%50"
#define SHARED_7 "%56, %57"
#define SHARED_ADD_7 "%58"
#define SHARED_8 "%64, %65"
#define SHARED_ADD_8 "%66"
#define SHARED_9 "%72, %73"
#define SHARED_ADD_9 "%74"
#define SHARED_10 "%80, %81"
#define SHARED_ADD_10 "%82"
#define SHARED_11 "%88, %89"
#define SHARED_ADD_11 "%90"
#define SHARED_12 "%96, %97"
#define SHARED_ADD_12 "%98"
#define SHARED_13 "%104, %105"
#define SHARED_ADD_13 "%106"
#define SHARED_14 "%112, %113"
#define SHARED_ADD_14 "%114"
#define SHARED_15 "%120, %121"
#define SHARED_ADD_15 "%122"
#define SHARED_16 "%128, %129"
#define SHARED_ADD_16 "%130"

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define SHAPE "m64n" STRING(COLUMNS) "k16"

#if BFLOAT
#define TYPES ".f32.bf16.bf16 "
#else
#define TYPES ".f32.f16.f16 "
#endif

// d = A · B (+ d if `add`), A [64, 16] in registers, B [T, 16] in shared memory
INLINE void wgmma(float (&d)[8 * BLOCKS], const uint32 *a, uint64 b, int add) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " JOIN(REGISTERS_ADD_, BLOCKS) ", 0;\n\t"
        "wgmma.mma_async.sync.aligned." SHAPE TYPES "{" JOIN(NAME_, BLOCKS) "}, " JOIN(REGISTERS_, BLOCKS) ", p, 1, 1, 0;\n\t}"
        : JOIN(SUMS_, BLOCKS) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// the same with A in shared memory
INLINE void wgmma(float (&d)[8 * BLOCKS], uint64 a, uint64 b, int add) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " JOIN(SHARED_ADD_, BLOCKS) ", 0;\n\t"
        "wgmma.mma_async.sync.aligned." SHAPE TYPES "{" JOIN(NAME_, BLOCKS) "}, " JOIN(SHARED_, BLOCKS) ", p, 1, 1, 0, 0;\n\t}"
        : JOIN(SUMS_, BLOCKS) : "l"(a), "l"(b), "r"(add));
}
