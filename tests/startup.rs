//! How weir starts where something is missing, and how it says that it cannot.

mod support;

use std::collections::BTreeMap;

use support::{Weir, base_config, free_address, run_to_its_end};

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

#[test]
fn a_port_that_is_taken_is_named() {
    let weir = Weir::start("");
    let directory = tempfile::tempdir().unwrap();
    let config = base_config(free_address()).replace("127.0.0.1:0", &weir.address.to_string());
    let (code, stderr) = run_to_its_end(directory.path(), &config);
    assert!(code.is_some_and(|code| code != 0));
    assert!(
        last_line(&stderr).contains(&weir.address.to_string()),
        "{stderr}"
    );
    assert!(last_line(&stderr).starts_with("weir: "), "{stderr}");

    let admin_taken = base_config(weir.admin);
    let (code, stderr) = run_to_its_end(directory.path(), &admin_taken);
    assert!(code.is_some_and(|code| code != 0));
    assert!(
        last_line(&stderr).contains(&weir.admin.to_string()),
        "{stderr}"
    );
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("out"), b"a file").unwrap();
    let (code, stderr) = run_to_its_end(directory.path(), &base_config(free_address()));
    assert!(code.is_some_and(|code| code != 0));
    assert!(
        last_line(&stderr).contains("out/Telemetry/Events"),
        "{stderr}"
    );
}

#[test]
fn a_memory_sum_above_the_limit_is_refused_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let config = format!(
        "{}[memory]\nlimit = \"16MiB\"\n",
        base_config(free_address())
    );
    let (code, stderr) = run_to_its_end(directory.path(), &config);
    assert!(code.is_some_and(|code| code != 0));
    assert!(
        last_line(&stderr).contains("16MiB (memory.limit)"),
        "{stderr}"
    );
    assert!(!directory.path().join("out").exists());
}

/// What a container runtime does that blocks io_uring.
#[test]
fn without_io_uring_it_says_how_to_allow_it() {
    use seccompiler::{SeccompAction, SeccompFilter};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    // The filter binds this thread and what it starts, for good.
    let outcome = std::thread::spawn(move || {
        let rules = BTreeMap::from([(libc::SYS_io_uring_setup, Vec::new())]);
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EPERM as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        )
        .unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        run_to_its_end(&path, &base_config(free_address()))
    })
    .join()
    .unwrap();
    let (code, stderr) = outcome;
    assert!(code.is_some_and(|code| code != 0));
    for word in ["io_uring", "seccomp", "kernel.io_uring_disabled"] {
        assert!(last_line(&stderr).contains(word), "{word}: {stderr}");
    }
}

#[test]
fn several_listeners_and_cores_are_announced_one_per_listener() {
    let admin = free_address();
    let config = format!(
        "cores = \"all\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n{}",
        base_config(admin)
    );
    let weir = Weir::start_with(&config, admin);
    for _ in 0..16 {
        assert_eq!(weir.connect().post("/x", b"{}").status, 201);
    }
    assert_eq!(weir.outcomes(), [16, 0, 0, 0]);
    let stopped = weir.stop();
    assert_eq!(stopped.rows("Telemetry", "Events").len(), 16);
}
