//! `weir check`: is the configuration valid, and is it likely what was meant?
//!
//! Nothing is opened, bound or started, so it can run beside a running node and in CI.
//! A sum above this machine's limit is a warning here: the file may be meant for another machine.

use super::{ConfigArgs, print, warnings_text};
use crate::budget::machine::Machine;
use crate::budget::{Budget, Registration};
use crate::config::Registered;
use crate::error::Fatal;

pub(super) fn run(args: &ConfigArgs) -> Result<(), Fatal> {
    let config = args.load()?;
    let machine = Machine::read();
    let budget = Budget::new(&config);
    let mut warnings = budget.warnings(&config, &machine);
    let registration = budget.registration(&machine);
    if config.slabs.registered == Registered::Prefer && registration != Registration::Expected {
        warnings.push(format!("slabs will be {registration}"));
    }
    if let Err(fatal) = budget.verify(&config, &machine) {
        warnings.push(format!("weir will not start here: {fatal}"));
    }
    print(&format!(
        "{}: valid\n{}",
        args.name(),
        warnings_text(&warnings)
    ))
}
