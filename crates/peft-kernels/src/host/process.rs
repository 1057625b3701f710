//! What a program that trains on a CPU does first.

/// Makes the calling thread one of those that compute, and lets the allocator keep what one step frees for the next.
///
/// For programs, at the start of `main`; both change the whole process, so the crates leave it to them. Without the first, the calling thread wakes others for each operation and sleeps
/// meanwhile. Without the second, the C library on Linux gives memory back between steps, and the system clears it again page by page; peak memory is the same.
///
/// ```
/// peft_kernels::prepare_process();
/// ```
///
/// Where `rayon`'s threads run already, or the C library is another, that part is left out.
pub fn prepare_process() {
    // It only fails where there is a pool, which then stays as it is.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    keep_memory();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "a function of the C library")]
fn keep_memory() {
    /// The largest that the C library takes: what is larger is asked of the system each time.
    const LARGEST: i32 = 32 << 20;
    // SAFETY: both are numbers that the function knows; it refuses what it does not like, and then all is as it was.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
    }
}
