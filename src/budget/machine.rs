//! What the machine allows this process: memory, pinned memory, open files.
//!
//! Read once at start, on the main thread. Nothing here changes a limit.
//! What can't be read counts as unlimited: the limits are enforced by the kernel anyway, this is
//! so that weir can say beforehand what it would run into.

use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use crate::config::Config;

/// `CAP_IPC_LOCK` in `linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;

/// Control groups of version 1 write the largest whole page count for "no limit".
const CGROUP_V1_UNLIMITED_MIN: u64 = 1 << 62;

/// A bound on the process's memory and who set it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes.
    pub size: u64,
    pub origin: String,
}

/// The limits this process runs under; `None` is unlimited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub cgroup_limit: Option<MemoryLimit>,
    /// Bytes this user may pin (`RLIMIT_MEMLOCK`, the soft limit).
    pub memlock_limit: Option<u64>,
    /// The memlock limit does not count.
    pub may_lock_memory: bool,
    /// Files this process may raise its limit to (`RLIMIT_NOFILE`, the hard limit).
    pub descriptor_limit: Option<u64>,
}

impl Machine {
    pub fn read() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            cgroup_limit: cgroup_limit(&text("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")),
            memlock_limit: getrlimit(Resource::Memlock).current,
            may_lock_memory: may_lock_memory(
                &text("/proc/self/status"),
                &text("/proc/self/uid_map"),
            ),
            descriptor_limit: getrlimit(Resource::Nofile).maximum,
        }
    }

    /// The smaller of the control group's limit and `memory.limit`.
    pub fn memory_limit(&self, config: &Config) -> Option<MemoryLimit> {
        let configured = config.memory.limit.map(|size| MemoryLimit {
            size,
            origin: "memory.limit".into(),
        });
        [configured, self.cgroup_limit.clone()]
            .into_iter()
            .flatten()
            .min_by_key(|limit| limit.size)
    }
}

/// The tightest memory limit of this process's control group and of those above it.
///
/// `membership` is `/proc/self/cgroup`: lines of `hierarchy:controllers:path`.
/// In a container without its own cgroup namespace the path is the host's and does not exist
/// below `mount`; then the mount's root is the container's group, and the walk ends there.
fn cgroup_limit(membership: &str, mount: &Path) -> Option<MemoryLimit> {
    let mut limits = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, file): (PathBuf, &str) = if controllers.is_empty() {
            (mount.into(), "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            (mount.join("memory"), "memory.limit_in_bytes")
        } else {
            continue;
        };
        let group = root.join(path.trim_start_matches('/'));
        for directory in group.ancestors().take_while(|path| path.starts_with(&root)) {
            // Absent where there is no such group, and in the root group of version 2.
            let Ok(text) = std::fs::read_to_string(directory.join(file)) else {
                continue;
            };
            // "max" is version 2's word for no limit.
            if let Ok(size) = text.trim().parse::<u64>()
                && size < CGROUP_V1_UNLIMITED_MIN
            {
                limits.push(size);
            }
        }
    }
    limits.into_iter().min().map(|size| MemoryLimit {
        size,
        origin: "the control group's memory limit".into(),
    })
}

/// Whether `CAP_IPC_LOCK` is in effect, and in the initial user namespace, the only one in which
/// io_uring lets it lift the limit.
fn may_lock_memory(status: &str, uid_map: &str) -> bool {
    let is_initial = uid_map.split_whitespace().eq(["0", "0", "4294967295"]);
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    is_initial && effective.is_some_and(|mask| mask & (1 << CAP_IPC_LOCK) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn takes_the_tightest_group_of_version_2() {
        let mount = tempfile::tempdir().unwrap();
        let group = mount.path().join("a/b");
        fs::create_dir_all(&group).unwrap();
        let limit = || cgroup_limit("0::/a/b\n", mount.path()).map(|limit| limit.size);
        assert_eq!(limit(), None);
        fs::write(group.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit(), None);
        fs::write(mount.path().join("a/memory.max"), "1000\n").unwrap();
        assert_eq!(limit(), Some(1000));
        fs::write(group.join("memory.max"), "2000\n").unwrap();
        assert_eq!(limit(), Some(1000));
        fs::write(group.join("memory.max"), "500\n").unwrap();
        assert_eq!(limit(), Some(500));
    }

    #[test]
    fn a_path_of_the_host_falls_back_to_the_mount() {
        let mount = tempfile::tempdir().unwrap();
        fs::write(mount.path().join("memory.max"), "700\n").unwrap();
        let limit = cgroup_limit("0::/system.slice/docker-1.scope\n", mount.path());
        assert_eq!(limit.unwrap().size, 700);
    }

    #[test]
    fn reads_version_1() {
        let mount = tempfile::tempdir().unwrap();
        let group = mount.path().join("memory/x");
        fs::create_dir_all(&group).unwrap();
        let membership = "5:cpu:/y\n4:memory:/x\n0::/\n";
        fs::write(group.join("memory.limit_in_bytes"), "9223372036854771712").unwrap();
        assert_eq!(cgroup_limit(membership, mount.path()), None);
        fs::write(group.join("memory.limit_in_bytes"), "900").unwrap();
        assert_eq!(cgroup_limit(membership, mount.path()).unwrap().size, 900);
        assert_eq!(cgroup_limit("nonsense", mount.path()), None);
    }

    #[test]
    fn the_capability_counts_in_the_initial_namespace_only() {
        let initial = "         0          0 4294967295\n";
        let with = "Name:\tweir\nCapEff:\t0000000000004000\n";
        let without = "Name:\tweir\nCapEff:\t000001ffffffbfff\n";
        assert!(may_lock_memory(with, initial));
        assert!(!may_lock_memory(without, initial));
        assert!(!may_lock_memory(with, "0 1000 1\n"));
        assert!(!may_lock_memory("", initial));
    }

    #[test]
    fn reads_this_machine() {
        // Whatever the limits are, reading them must work and agree with itself.
        assert_eq!(Machine::read(), Machine::read());
    }
}
