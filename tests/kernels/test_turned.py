"""Products of transposed sums are found in what Triton makes of a kernel, and only those."""

from nlscale_kernels.turned import turned_sums

SUM = "%s_1 = ttng.warp_group_dot %a, %b, %none {isAsync = true} : !m * !m -> tensor<64x64xf32, #mma> loc(#loc1)\n"
HALF = "%h_2 = arith.truncf %s_1 : tensor<64x64xf32, #mma> to tensor<64x64xbf16, #mma> loc(#loc2)\n"
TURNED = "%t_3 = tt.trans %h_2 {order = array<i32: 1, 0>} : tensor<64x64xbf16, #mma> -> tensor<64x64xbf16, #linear>\n"
STORED = "%m_4 = ttg.local_alloc %t_3 : (tensor<64x64xbf16, #linear>) -> !ttg.memdesc<64x64xbf16, #shared> loc(#loc4)\n"
LOADED = "%l_5 = ttg.local_load %m_4 : !ttg.memdesc<64x64xbf16, #shared> -> tensor<64x64xbf16, #dot> loc(#loc5)\n"
PRODUCT = "%p_6 = ttng.warp_group_dot %l_5, %q, %none {inputPrecision = 0 : i32} : tensor<64x64xbf16, #dot> * !m\n"


def test_a_transposed_sum_is_found() -> None:
    assert turned_sums(SUM + HALF + TURNED + STORED + LOADED + PRODUCT) == ["%p_6"]
    assert turned_sums(SUM + HALF + TURNED + STORED + LOADED + PRODUCT.replace("%l_5, %q", "%m_4, %q")) == ["%p_6"]


def test_what_is_loaded_added_or_the_second_operand_is_none() -> None:
    loaded = TURNED.replace("bf16, #mma>", "bf16, #blocked>")
    assert turned_sums(SUM + HALF + loaded + STORED + LOADED + PRODUCT) == []
    assert turned_sums(SUM + HALF + TURNED + STORED + LOADED + PRODUCT.replace("%l_5, %q", "%q, %l_5")) == []
    back = "%m_4 = ttg.convert_layout %t_3 : tensor<64x64xbf16, #linear> -> tensor<64x64xbf16, #mma> loc(#loc4)\n"
    assert turned_sums(SUM + HALF + TURNED + back + LOADED + PRODUCT) == []
