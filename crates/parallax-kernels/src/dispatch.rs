//! Which instruction set the kernels use: detected once, and overridable per call for tests and comparisons.
//!
//! Every level computes the same bits (see the crate documentation), so the choice is about speed alone.

use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::simd::neon::Neon;
use crate::simd::scalar::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::simd::{avx2::Avx2, avx512::Avx512};

/// An instruction set level. On other architectures than x86-64 and aarch64 only `Scalar` exists, which the compiler
/// vectorises with whatever the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// Portable code.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// NEON, which every aarch64 processor with an operating system has.
    Neon,
    /// NEON and the dot products of bytes (`dotprod`: optional from ARMv8.2 on, always there from 8.4 on).
    NeonDot,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
            Self::Neon => "NEON",
            Self::NeonDot => "NEON with dot products",
        })
    }
}

/// Levels of this architecture, slowest first.
#[cfg(target_arch = "x86_64")]
pub(crate) const LEVELS: &[Level] = &[Level::Scalar, Level::Avx2, Level::Avx512];
/// Levels of this architecture, slowest first.
#[cfg(target_arch = "aarch64")]
pub(crate) const LEVELS: &[Level] = &[Level::Scalar, Level::Neon, Level::NeonDot];
/// Levels of this architecture.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) const LEVELS: &[Level] = &[Level::Scalar];

/// Proof that a level's instructions exist on this machine.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon<false>),
    #[cfg(target_arch = "aarch64")]
    NeonDot(Neon<true>),
}

impl Isa {
    fn detect(level: Level) -> Option<Self> {
        match level {
            Level::Scalar => Some(Self::Scalar(Scalar)),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => Neon::detect().map(Self::Neon),
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => Neon::detect().map(Self::NeonDot),
            _ => None,
        }
    }

    fn level(self) -> Level {
        match self {
            Self::Scalar(_) => Level::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Level::Avx512,
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => Level::Neon,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(_) => Level::NeonDot,
        }
    }
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// The level that kernels called from this thread use.
pub fn level() -> Level {
    current().level()
}

/// Levels of this machine, slowest first.
pub fn available() -> Vec<Level> {
    LEVELS.iter().copied().filter(|&l| Isa::detect(l).is_some()).collect()
}

/// Calls `f` with this thread's kernels held to `level`; `None`, without calling it, where the machine lacks it.
pub fn with_level<R>(level: Level, f: impl FnOnce() -> R) -> Option<R> {
    let isa = Isa::detect(level)?;
    let outer = FORCED.replace(Some(isa));
    let result = f();
    FORCED.set(outer);
    Some(result)
}

/// The instruction set for a kernel that starts on this thread; the kernel hands it to its tasks.
pub(crate) fn current() -> Isa {
    static BEST: OnceLock<Isa> = OnceLock::new();
    FORCED.get().unwrap_or_else(|| {
        *BEST
            .get_or_init(|| LEVELS.iter().rev().copied().find_map(Isa::detect).unwrap_or(Isa::Scalar(Scalar)))
    })
}

/// Defines a kernel once, generically over [`crate::simd::Simd`], and compiles it for every level.
///
/// `fn name(s; x: T, ..) -> R { body }` becomes `fn name(isa: Isa, x: T, ..) -> R`; in the body `s` is the level's token.
macro_rules! simd_kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($s:ident; $($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[expect(clippy::allow_attributes, reason = "whether the lint fires depends on the kernel")]
        #[allow(clippy::too_many_arguments, reason = "kernels take slices and strides, not objects")]
        $vis fn $name(isa: $crate::dispatch::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn generic<S: $crate::simd::Simd>($s: S, $($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2(s: $crate::simd::avx2::Avx2, $($arg: $ty),*) $(-> $ret)? {
                generic(s, $($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn avx512(s: $crate::simd::avx512::Avx512, $($arg: $ty),*) $(-> $ret)? {
                generic(s, $($arg),*)
            }

            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon(s: $crate::simd::neon::Neon<false>, $($arg: $ty),*) $(-> $ret)? {
                generic(s, $($arg),*)
            }

            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon,dotprod")]
            fn neon_dot(s: $crate::simd::neon::Neon<true>, $($arg: $ty),*) $(-> $ret)? {
                generic(s, $($arg),*)
            }

            match isa {
                $crate::dispatch::Isa::Scalar(s) => generic(s, $($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the token exists, so AVX2, FMA and F16C were detected on this machine.
                $crate::dispatch::Isa::Avx2(s) => unsafe { avx2(s, $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the token exists, so the AVX-512 features named above were detected on this machine.
                $crate::dispatch::Isa::Avx512(s) => unsafe { avx512(s, $($arg),*) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: the token exists, so NEON was detected on this machine.
                $crate::dispatch::Isa::Neon(s) => unsafe { neon(s, $($arg),*) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: the token exists, so NEON and its dot products were detected on this machine.
                $crate::dispatch::Isa::NeonDot(s) => unsafe { neon_dot(s, $($arg),*) },
            }
        }
    };
}
pub(crate) use simd_kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_level_ends_with_its_closure() {
        let outer = level();
        assert_eq!(with_level(Level::Scalar, level), Some(Level::Scalar));
        assert_eq!(level(), outer);
        assert!(available().contains(&Level::Scalar));
    }

    #[test]
    fn the_best_level_is_used_and_every_other_can_be_asked_for() {
        assert_eq!(available().last(), Some(&level()));
        for l in available() {
            assert_eq!(with_level(l, level), Some(l));
        }
        assert_eq!(with_level(Level::Neon, level).is_some(), cfg!(target_arch = "aarch64"));
        assert!(with_level(Level::NeonDot, level).is_none_or(|_| available().contains(&Level::Neon)));
    }
}
