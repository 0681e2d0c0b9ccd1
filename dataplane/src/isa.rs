//! Hot loops compiled twice: for any processor, and for those with AVX2 and bit manipulation
//! (x86-64-v3), chosen at run time. So one binary serves all machines.

/// Whether this processor has what [`for_this_cpu`] compiles for.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn is_v3() -> bool {
    use std::sync::LazyLock;
    static IS_V3: LazyLock<bool> = LazyLock::new(|| {
        std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("bmi1")
            && std::is_x86_feature_detected!("bmi2")
            && std::is_x86_feature_detected!("lzcnt")
            && std::is_x86_feature_detected!("movbe")
            && std::is_x86_feature_detected!("popcnt")
    });
    *IS_V3
}

/// Which of the two this processor runs, for reports: `x86-64-v3` or `baseline`.
pub fn isa_level() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if is_v3() {
        return "x86-64-v3";
    }
    "baseline"
}

/// Defines a function that calls another, which is `#[inline(always)]`, in whichever of two
/// compiled forms suits the processor. What that function does not inline stays as it is.
macro_rules! for_this_cpu {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($life:lifetime,)? $ring:ident: $bound:ident>)? ($($arg:ident: $type:ty),* $(,)?)
            $(-> $result:ty)? = $body:path;
    ) => {
        $(#[$meta])*
        #[inline]
        #[allow(unsafe_code, reason = "the processor is asked before; this macro is in one place")]
        $vis fn $name $(<$($life,)? $ring: $bound>)? ($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,movbe,popcnt")]
                fn v3 $(<$($life,)? $ring: $bound>)? ($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                if crate::isa::is_v3() {
                    // SAFETY: the processor has all of these features.
                    return unsafe { v3($($arg),*) };
                }
            }
            #[inline(never)]
            fn baseline $(<$($life,)? $ring: $bound>)? ($($arg: $type),*) $(-> $result)? {
                $body($($arg),*)
            }
            baseline($($arg),*)
        }
    };
}

pub(crate) use for_this_cpu;
