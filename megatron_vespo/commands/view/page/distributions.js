export async function mount(element, context) {
  element.append("nothing here yet");
}

export function unmount() {}
