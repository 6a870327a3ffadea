//! Which CPU is the server's and which is ours, and the pinning to them.
//!
//! A child inherits the affinity of the thread that starts it, so the server is pinned by pinning ourselves first.
//! Not here: the CPU time of the server; see `process`.

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// The two sides of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPlan {
    pub server: usize,
    pub client: usize,
}

impl CpuPlan {
    /// The first allowed CPU for the server, the last for the client; the same one where there is only one.
    pub fn choose() -> Result<Self> {
        let set = sched_getaffinity(None).context("sched_getaffinity")?;
        CpuPlan::from_allowed((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)))
    }

    fn from_allowed(mut allowed: impl Iterator<Item = usize>) -> Result<Self> {
        let Some(server) = allowed.next() else {
            bail!("this process may run on no CPU");
        };
        Ok(CpuPlan {
            server,
            client: allowed.last().unwrap_or(server),
        })
    }

    pub fn is_shared(&self) -> bool {
        self.server == self.client
    }
}

/// Pins the calling thread, and what it starts from now on.
pub fn pin(cpu: usize) -> Result<()> {
    allow(&[cpu])
}

/// Lets the calling thread, and what it starts from now on, use these CPUs only.
pub fn allow(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).with_context(|| format!("pinning to CPU {cpus:?}"))
}

/// CPU time of the calling thread so far.
pub fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither part of this clock is ever negative.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_and_client_are_as_far_apart_as_they_can_be() {
        let plan = |allowed: &[usize]| CpuPlan::from_allowed(allowed.iter().copied());
        assert_eq!(
            plan(&[0, 1]).expect("two"),
            CpuPlan {
                server: 0,
                client: 1
            }
        );
        assert_eq!(
            plan(&[2, 3, 7]).expect("three"),
            CpuPlan {
                server: 2,
                client: 7
            }
        );
        assert!(plan(&[5]).expect("one").is_shared());
        assert!(plan(&[]).is_err());
    }

    #[test]
    fn a_pinned_thread_is_allowed_one_cpu() {
        std::thread::spawn(|| {
            let plan = CpuPlan::choose().expect("at least one CPU");
            pin(plan.client).expect("it was allowed");
            let after = CpuPlan::choose().expect("one CPU");
            assert_eq!((after.server, after.client), (plan.client, plan.client));
        })
        .join()
        .expect("no panic");
    }
}
