//! Runs the checker over one model and says what came of it. Knows nothing of the rules.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::actions::Action;
use crate::rules::Protocol;

/// A history that ends where a property no longer holds.
pub struct Counterexample {
    pub property: &'static str,
    pub steps: Vec<Action>,
    /// The moment it ends in, for reading.
    pub end: String,
}

/// Tries every history within the bounds, and demands that every property holds and every example occurs.
///
/// # Panics
/// With a short history that breaks a property, or the name of the example that does not occur.
pub fn assert_holds(name: &str, model: Protocol) {
    let begun = Instant::now();
    // Depth first: the same states, but few of them wait in memory at a time.
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    println!(
        "{name}, {:?}: {} states, {} steps between them, in {:.1} s",
        model.policy,
        checker.unique_state_count(),
        checker.state_count(),
        begun.elapsed().as_secs_f64()
    );
    let found = checker.discoveries();
    for property in model.properties() {
        match (property.expectation.discovery_is_failure(), found.contains_key(property.name)) {
            (true, true) => panic!("{}", find_counterexample(model).map_or_else(String::new, |c| c.story())),
            (false, false) => panic!("{name}, {:?}: never happens: {}", model.policy, property.name),
            (true, false) | (false, true) => {}
        }
    }
}

/// A history within the bounds that breaks a property, if there is one. It is among the shortest: the search goes by
/// length, but looks at many histories before it stops.
pub fn find_counterexample(model: Protocol) -> Option<Counterexample> {
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let failures = model.properties().into_iter().filter(|p| p.expectation.discovery_is_failure());
    let found = failures.filter_map(|property| Some((property.name, checker.discovery(property.name)?)));
    let (property, path) = found.min_by_key(|(_, path)| path.clone().into_actions().len())?;
    let end = path.last_state().to_string();
    Some(Counterexample { property, steps: path.into_actions(), end })
}

impl Counterexample {
    /// The history, a step per line, and where it ends.
    pub fn story(&self) -> String {
        let steps: String = self.steps.iter().enumerate().map(|(i, step)| format!("  {:2}  {step}\n", i + 1)).collect();
        format!("broken: {}\n{steps}{}", self.property, self.end)
    }
}
